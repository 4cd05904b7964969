"""Decides which runs of a model that was compiled in place run compiled."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from plasticnet.gates.compiled import HookedCalls
from plasticnet.tools.torch_private import after_backward
from plasticnet.tools.trees import tensors_within

# Of the compiled runs of a kind the first ones compile, and so many of the next ones are compared with those before.
COMPILING, COMPARED = 2, 8
# What share of their time runs are taken to save compiled where nothing is known yet, and the least that is reckoned.
PRESUMED, LEAST = 1 / 4, 1 / 10
# By which share of their time compiling may put the runs of a network behind what they would have taken as written.
BEHIND = 1 / 20


class _Times:
    """How many seconds runs took, with their backward passes.

    Args:
        kept: Of how many runs, the last ones, each is remembered.

    Attributes:
        total: The seconds of all runs.
        count: How many there were.
    """

    def __init__(self, kept: int) -> None:
        self.total, self.count = 0.0, 0
        self._last: deque[list[float]] = deque(maxlen=kept)

    @property
    def last(self) -> list[float]:
        """The seconds of each of the last runs."""
        return [sum(parts) for parts in self._last]

    def add(self, seconds: float) -> Callable[[float], None]:
        """Add a run, and return a function that adds seconds to it."""
        parts: list[float] = []

        def more(seconds: float) -> None:
            parts.append(seconds)
            self.total += seconds

        more(seconds)
        self.count += 1
        self._last.append(parts)
        return more


class _Kind:
    """What is known of the runs of one kind.

    Attributes:
        written: The runs at the present sizes that ran as written.
        compiled: Those that ran compiled.
        batches: How many runs had a batch of each size.
        batch: The size of the first batch that ran compiled, or None.
        cost: The seconds that compiling took, at these sizes or the last ones where it did, or None.
        saving: The share of their time that compiled runs have saved, likewise; below 0 where they took longer.
        refused: Whether the compiler cannot do it at all.
    """

    def __init__(self) -> None:
        self.cost: float | None = None
        self.saving: float | None = None
        self.refused = False
        self.renew()

    def renew(self) -> None:
        """Begin anew at other sizes, but remember what compiling costs and saves."""
        self.written, self.compiled = _Times(4 * COMPARED), _Times(COMPILING + COMPARED)
        self.batches: Counter[int] = Counter()
        self.batch: int | None = None

    def learn(self) -> None:
        """Take from the runs at the present sizes what compiling costs and saves, as soon as they tell."""
        if not self.written.count or not self.compiled.count or self.compiled.count > COMPILING + COMPARED:
            return
        usual, compiled = median(self.written.last), self.compiled.last
        self.cost = max(sum(compiled[:COMPILING]) - len(compiled[:COMPILING]) * usual, 0.0)
        if len(compiled) == COMPILING + COMPARED:
            self.saving = 1 - median(compiled[COMPILING:]) / usual

    @property
    def behind(self) -> float:
        """How many seconds more the compiled runs at the present sizes took than they would have taken as written."""
        if not self.written.count:
            return 0.0
        return self.compiled.total - self.compiled.count * median(self.written.last)

    @property
    def slower(self) -> bool:
        """Whether compiled runs have turned out slower at the present sizes."""
        return self.saving is not None and self.saving <= 0 and self.compiled.count >= COMPILING + COMPARED

    def suits(self, batch: int, fixed: bool) -> bool:
        """Return whether a batch of this size is one to compile for.

        Args:
            batch: The size of the batch.
            fixed: Whether what is compiled serves a single size.
        """
        usual, times = self.batches.most_common(1)[0]
        if fixed:
            return batch == (usual if self.batch is None else self.batch)
        return batch == usual or 2 * times <= self.batches.total()


class Tiers:
    """How long the runs of a network take, by which they run as the model was written, or compiled.

    To compile takes as long as many runs, and a change of size makes what was compiled worthless. So runs of a kind go
    on as written until two things hold. First, had those at the present sizes run compiled, they would have saved what
    compiling costs; and they have taken ``after`` seconds. Second, compiling leaves all runs of the network together at
    most a twentieth behind what they would have taken as written. So a network that is trained for a minute is never
    compiled, and one that compiled runs do not suit loses a twentieth at most.

    What compiling costs and saves is known from the last time. Before the first one, a guess of the costs is given, and
    the saving is taken to be a quarter. It is never taken to be less than a tenth: where compiled runs were slower,
    runs at other sizes must have taken ten times what compiling took before they are compiled once more. At the sizes
    at which they were slower, they go on as written. Backward passes count as parts of their runs.

    Batches of an unusual size, as the last ones of epochs are, run as written, so that nothing is compiled for them.
    Where sizes vary and a kind is not ``fixed``, all of them run compiled.

    Args:
        after: The seconds; 0 compiles at once, whatever it costs.
        cost: The seconds that compiling is expected to take, as long as that is not known.
        hooked: What calls a model, compiled, while gates act by hooks. None if such runs always run as written.
        start: Prepares the model for compiled runs. It is called before the first one, because the compiler takes
            seconds to import.

    Attributes:
        start: None once it was called.
    """

    def __init__(
        self,
        after: float,
        cost: float = 0.0,
        hooked: HookedCalls | None = None,
        start: Callable[[], object] | None = None,
    ) -> None:
        self.after, self.cost, self.hooked, self.start = after, cost, hooked, start
        self._total = self._behind = 0.0  # the seconds of all runs, and those by which they were behind at past sizes
        self._kinds: dict[Hashable, _Kind] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "hooked": None, "start": None}  # a copy of a compiled model is not compiled

    def renew(self) -> None:
        """Begin anew, because sizes have changed; what was compiled for others is thrown away."""
        if any(known.batch is not None for known in self._kinds.values()):
            # Otherwise the compiler would soon meet its limit of recompilations, and give up.
            torch.compiler.reset()
        for known in self._kinds.values():
            known.learn()
            self._behind += known.behind
            self._total += known.written.total + known.compiled.total
            known.renew()

    def compiles(self, kind: Hashable, batch: int, fixed: bool) -> bool:
        """Return whether the next run is to run compiled.

        Args:
            kind: What tells it from others that are compiled separately.
            batch: The size of its batch.
            fixed: Whether what is compiled serves batches of a single size.
        """
        known = self._kinds.setdefault(kind, _Kind())
        known.learn()
        known.batches[batch] += 1
        if known.refused or known.slower or not known.suits(batch, fixed):
            return False
        if known.batch is None and self.after and not self._pays(known):
            return False
        known.batch = batch if known.batch is None else known.batch
        if self.start is not None:
            self.start()
            self.start = None
        return True

    def _pays(self, known: _Kind) -> bool:
        """Return whether compiling runs of a kind promises to pay at the present sizes, and may go wrong."""
        cost = self.cost if known.cost is None else known.cost
        saving = PRESUMED if known.saving is None else max(known.saving, LEAST)
        if known.written.total < max(self.after, cost / saving):
            return False
        kinds = self._kinds.values()
        total = self._total + sum(k.written.total + k.compiled.total for k in kinds)
        return self._behind + sum(k.behind for k in kinds) + cost <= BEHIND * total

    def give_up(self, kind: Hashable) -> None:
        """Note that the compiler cannot compile runs of a kind, whatever the sizes."""
        self._kinds.setdefault(kind, _Kind()).refused = True

    @contextmanager
    def timing(self, kind: Hashable, compiled: bool) -> Iterator[Callable[[Any], None]]:
        """Time a run within this context, which yields a function for its output, to time its backward pass, too.

        Args:
            kind: What tells it from others that are compiled separately.
            compiled: Whether it runs compiled.
        """
        known = self._kinds.setdefault(kind, _Kind())
        times = known.compiled if compiled else known.written
        outputs: list[Any] = []
        begun = time.perf_counter()
        yield outputs.append
        more = times.add(time.perf_counter() - begun)
        node = next((t.grad_fn for output in outputs for t in tensors_within(output) if t.grad_fn is not None), None)
        if node is not None:
            node.register_prehook(lambda _: _time_backward(more))


def _time_backward(more: Callable[[float], None]) -> None:
    """Hand over how long it takes from here to the end of the backward pass that is running."""
    begun = time.perf_counter()
    after_backward(lambda: more(time.perf_counter() - begun))
