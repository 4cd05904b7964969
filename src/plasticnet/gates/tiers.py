"""Decides which runs of a model that was compiled in place run compiled."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Of the compiled runs of a kind the first ones compile, and the next ones are compared with those before.
COMPILING, COMPARED = 2, 8


@dataclass
class _Kind:
    """What is known of the runs of one kind at the present sizes: numbers of runs, and seconds that they have taken."""

    written: int = 0
    seconds: float = 0.0
    compiled: int = 0
    compared: float = 0.0
    slower: bool = False


class Tiers:
    """How long the runs of a network take, by which they run as the model was written, or compiled.

    To compile takes as long as many runs, and a change of size makes what was compiled worthless. So runs go on as
    written until those of their kind have taken ``after`` seconds at the present sizes. The next ones run compiled. If
    they then take longer than those before, runs of this kind go on as written until sizes change.

    Args:
        after: The seconds.
    """

    def __init__(self, after: float) -> None:
        self.after = after
        self._kinds: dict[Hashable, _Kind] = {}
        self._compiled = False  # whether anything was compiled at these sizes

    def renew(self) -> None:
        """Begin anew, because sizes have changed; what was compiled for others is thrown away."""
        self._kinds = {}
        if self._compiled:
            # Otherwise the compiler would soon meet its limit of recompilations, and give up.
            torch.compiler.reset()
            self._compiled = False

    def compiles(self, kind: Hashable) -> bool:
        """Return whether the next run of a kind is to run compiled."""
        known = self._kinds.setdefault(kind, _Kind())
        return known.seconds >= self.after and not known.slower

    @contextmanager
    def timing(self, kind: Hashable, compiled: bool) -> Iterator[None]:
        """Time a run within this context.

        Args:
            kind: What tells it from others that are compiled separately.
            compiled: Whether it runs compiled.
        """
        begun = time.perf_counter()
        yield
        taken, known = time.perf_counter() - begun, self._kinds.setdefault(kind, _Kind())
        if not compiled:
            known.written, known.seconds = known.written + 1, known.seconds + taken
            return
        self._compiled = True
        known.compiled += 1
        if known.compiled > COMPILING:
            known.compared += taken
        if known.compiled == COMPILING + COMPARED and known.written:
            known.slower = known.compared / COMPARED > known.seconds / known.written
