"""Compares the outputs of a masked model with those of a cut one, and the outputs before and after growth."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.checking.culprits import Stopped, stopped
from plasticnet.checking.draws import EvenDraws
from plasticnet.gates.run import Gating
from plasticnet.surgery.compact import cut
from plasticnet.surgery.plan import lengths, plan_resize
from plasticnet.surgery.rewrite import apply_plan
from plasticnet.tools.difference import relative_difference
from plasticnet.tools.inputs import Call, copy_inputs
from plasticnet.tools.precision import HALF
from plasticnet.tools.snapshot import left_as_it_was, sharing
from plasticnet.tools.torch_private import Dropout
from plasticnet.tools.trees import numbers_within
from plasticnet.units import BlockUnits, ExpertUnits, InputUnits, Units, without_lost_inputs

# The relative tolerances in double precision, in which some norms still compute in single, and in other precisions.
FINE, ROUGH = 2e-6, 1e-3
# What rounding makes of outputs in half precision after some dozen layers.
_COARSE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
DISAGREE = "cutting its units changes the output: the model uses its width in a way that tracing cannot see"
DISAGREE_IN_TRAINING = (
    "cutting its units changes the output in training mode: there the model uses its width in a way that tracing "
    "cannot see"
)
DIFFERS = frozenset({DISAGREE, DISAGREE_IN_TRAINING})
STOPS = "the model does not run when units are cut"
# What torch says where a tensor of a fixed size meets one that was cut, and the way out.
_NAMES_SIZES = re.compile(r"\b(sizes?|shapes?)\b", re.IGNORECASE)
_SIZES = (
    "; where forward writes a size as a number, take it from a shape, as x.shape[-1], or from a whole number that is "
    "an attribute of a module, as self.width, which follows"
)
_KEEPS = "cutting its units changes what the model keeps for its next call in {names}"
_IMPOSSIBLE = "its parameters or attributes cannot be changed: {error!r}"
_DRAWN = 8  # how many random choices of closed experts are compared
_SEED = 1  # of the generators that are not torch's, in training mode
_REPEATS = 4  # how often a model is called again to find out whether it repeats itself
_UNSTEADY = (
    "the model gives other outputs whenever it is called, so that nothing can be compared: it draws random numbers "
    "that are not torch's, or reads a clock; switch that off in evaluation mode, or seed it in forward"
)
BLIND = "closing its units does not move the output, so that the check cannot vouch for it"

Pattern = Callable[[int, int], Tensor]  # the gates of a site, for its number of units and its place among the sites


class Comparing:
    """A model with random parameters and its inputs, on which masking and cutting are compared.

    Args:
        model: The model, in evaluation mode. It is left as it was.
        calls: How it is called.
        tolerance: The largest relative difference of outputs that counts as rounding.
        patterns: Functions that give the gates of a site, shape (units,), for its number of units and its place among
            the sites. All sites are compared under the first one, then under the next.
        stateful: Whether the model keeps something from one call to the next. It is then called twice in a row.
        random: Whether the model draws random numbers in evaluation mode. Draws are then made comparable.
        vouch: Whether sites fail when closing their units under the last pattern does not change the output.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        tolerance: float,
        patterns: list[Pattern],
        stateful: bool = False,
        random: bool = False,
        vouch: bool = True,
    ) -> None:
        self.model, self.calls, self.tolerance = model, calls, tolerance
        self.patterns, self.stateful, self.vouch = patterns, stateful, vouch
        self.random = random or any(call.training for call in calls)

    @cached_property
    def reference(self) -> list[Tensor]:
        """The outputs of the model with all units open."""
        return self.outputs(self.model)

    def keep_what_repeats(self) -> None:
        """Leave out the calls in training mode in which the model fails, or gives other outputs when called again.

        Nothing can be compared in them. Their draws may be out of reach, as those of a generator of the model's own.
        """
        kept = [call for call in self.calls if not call.training or self._repeats(call)]
        if len(kept) < len(self.calls):
            self.calls = kept
            self.reference = self.outputs(self.model)

    def _repeats(self, call: Call) -> bool:
        """Return whether the model gives the same outputs in two runs of a call."""
        try:
            first, again = (self._call(call, self.model, _plainly, lambda _: [])[0] for _ in range(2))
        except Exception:  # the model may refuse its random parameters here, in any way
            return False
        return relative_difference(first, again) <= self._allowed(first)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return the outputs of a model, which is left as it was, in all calls."""
        return [t for outputs in self._called(model, _plainly)[0] for t in outputs]

    def masked(self, sites: Mapping[str, Units], factors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs of the whole model with the gates multiplied in.

        Args:
            sites: The sites that have gates.
            factors: The gates of each of these sites, shape (units,).
        """
        return [t for outputs in self._called(self.model, _masking(sites, factors))[0] for t in outputs]

    def _called(
        self, model: nn.Module, run: Callable[..., Any], keeps: Callable[[nn.Module], list[Tensor]] = lambda _: []
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Return the outputs in all calls, each of which begins with the same state and draws the same numbers.

        Args:
            model: The model.
            run: Calls a model with positional and keyword arguments.
            keeps: Returns what is to be known of the model as each call leaves it.

        Returns:
            The outputs of each call, and what ``keeps`` returns.
        """
        found = [self._call(call, model, run, keeps) for call in self.calls]
        return [outputs for outputs, _ in found], [t for _, kept in found for t in kept]

    def _call(
        self, call: Call, model: nn.Module, run: Callable[..., Any], keeps: Callable[[nn.Module], list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs in one call, and what ``keeps`` returns; the arguments are those of `_called`."""
        found: list[Tensor] = []
        twin = sharing(model) if self.stateful else model  # because a state need not lie in a buffer
        with left_as_it_was(twin), _mode(twin, call.training):
            for _ in range(2 if self.stateful else 1):
                args, kwargs = copy_inputs((call.args, call.kwargs))
                with EvenDraws() if self.random else nullcontext():
                    found += _comparable(call.read(run(twin, args, kwargs)))
            return found, keeps(twin)

    def cut_differs(self, sites: Mapping[str, Units]) -> str | None:
        """Return why masking and cutting differ for these sites, or None if they agree under every pattern.

        What lies in a block that is closed is not compared, so blocks are closed in trials of their own.
        """
        sites = without_lost_inputs(sites)
        names = _buffers_of_experts(self.model, sites)
        for factors, telling in self._trials(sites):
            try:
                small = cut(sharing(self.model), sites, factors)
            except Exception as error:  # an attribute of the model may refuse to change
                return _IMPOSSIBLE.format(error=error)
            try:
                compared, left = self._called(small, _plainly, partial(_copies, names))
            except Exception as error:  # a forward that hard-codes a width can raise anything
                return _stopped(error)
            try:
                run, keeps = _masking(sites, factors), partial(_copies_of_cut, names, sites, factors)
                masked, kept = self._called(self.model, run, keeps)
            except Exception as error:  # a norm that counts open units may need the length of what it gets
                return f"the model does not run while its units are masked: {error}"
            every = [t for outputs in masked for t in outputs]
            allowed, pairs = self._allowed(every), zip(self.calls, masked, compared, strict=True)
            wrong = [call.training for call, a, b in pairs if relative_difference(a, b) > allowed]
            if wrong:
                return self._unsteady() or (DISAGREE_IN_TRAINING if all(wrong) else DISAGREE)
            if relative_difference(kept, left) > allowed:
                return _KEEPS.format(names=", ".join(names))
            if not every:
                return "the model has no floating-point output to compare"
            closed = any((f == 0).any() for f in factors.values())
            if telling and self.vouch and closed and all(map(torch.equal, self.reference, every)):
                return BLIND
        # A closed input takes away what it alone reads, so that widths which a pattern tells apart may become equal.
        behind = {n: u for n, u in sites.items() if not isinstance(u, InputUnits)}
        return self.cut_differs(behind) if 0 < len(behind) < len(sites) else None

    def _unsteady(self) -> str | None:
        """Return that the model itself gives other outputs when it is called again, or None if it does not."""
        allowed = self._allowed(self.reference)
        again = (relative_difference(self.reference, self.outputs(self.model)) for _ in range(_REPEATS))
        return _UNSTEADY if any(difference > allowed for difference in again) else None

    def _allowed(self, outputs: Sequence[Tensor]) -> float:
        """Return the largest relative difference that counts as rounding, which is more in half precision.

        A model that computes in double precision may round its outputs in the end, to a neighbouring number.
        """
        kinds = {t.dtype for t in outputs}
        if self.tolerance == FINE:
            return max([FINE, *(2 * torch.finfo(kind).eps for kind in kinds & HALF)])
        kinds |= {p.dtype for p in self.model.parameters()}
        return max([self.tolerance, *(_COARSE[kind] for kind in kinds & HALF)])

    def _trials(self, sites: Mapping[str, Units]) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Yield the gates of each trial, and whether so many are closed that the output has to move.

        Every pattern is tried with all blocks open. Where there are blocks, the last pattern is tried again with some
        of them closed, and with all; where there are experts, with those closed that have certain places.
        """
        device = next(self.model.parameters()).device

        def gates(pattern: Pattern, blocks: Callable[[int], Tensor]) -> dict[str, Tensor]:
            numbered = enumerate(sites.items())
            drawn = {n: blocks(u.size) if isinstance(u, BlockUnits) else pattern(u.size, i) for i, (n, u) in numbered}
            return {n: z.to(device) for n, z in drawn.items()}

        last, alone = self.patterns[-1], all(isinstance(u, ExpertUnits) for u in sites.values())
        for pattern in self.patterns if not alone else ():
            yield gates(pattern, torch.ones), pattern is last
        if any(isinstance(u, BlockUnits) for u in sites.values()):
            yield gates(last, lambda n: torch.rand(n).round()), False
            yield gates(last, torch.zeros), True
        if any(isinstance(u, ExpertUnits) for u in sites.values()):  # a forward may treat experts by their place
            drawn = [_some_closed] * (_DRAWN if alone else 0)
            for experts in (_first_closed, _last_closed, _first_half_closed, _every_other, *drawn):
                yield gates(last, experts), False

    def growth_differs(self, sites: Mapping[str, Units]) -> str | None:
        """Return why one more unit for each of these sites changes the output or fails, or None.

        The new units read with random weights and are read with weights of zero, so that the output should stay.
        """
        sites = without_lost_inputs(sites)
        sources = {n: [*range(u.size), -1] for n, u in sites.items() if u.growable and not isinstance(u, InputUnits)}
        grown = sharing(self.model)
        try:
            apply_plan(grown, plan_resize(sites, lengths(grown), sources), {})
        except Exception as error:  # an attribute of the model may refuse to change
            return _IMPOSSIBLE.format(error=error)
        try:
            if relative_difference(self.reference, self.outputs(grown)) > self._allowed(self.reference):
                return "growing its units changes the output"
        except Exception as error:  # a forward that hard-codes a width can raise anything
            return f"the model does not run when units are added: {error}"
        return None


def _stopped(error: Exception) -> Stopped:
    """Return that a model does not run when units are cut, with its error, and the way out where it names sizes."""
    what = str(error).splitlines()[0][:200] if str(error) and not isinstance(error, KeyError) else repr(error)
    return stopped(f"{STOPS}: {what}{_SIZES if _NAMES_SIZES.search(what) else ''}", error)


def _plainly(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return the output of a model."""
    return model(*args, **kwargs)


def _masking(sites: Mapping[str, Units], factors: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return a function that calls a model with gates multiplied in; the arguments are those of `Comparing.masked`."""
    z = torch.cat([*factors.values(), next(iter(factors.values())).new_ones(1)])
    return lambda model, args, kwargs: Gating(sites, model).run(z, args, kwargs)


def _buffers_of_experts(model: nn.Module, sites: Mapping[str, Units]) -> list[str]:
    """Return the names of buffers with an entry for each expert, such as a bias that balances their load."""
    buffers = {name for name, _ in model.named_buffers()}
    return [s.tensor for u in sites.values() if isinstance(u, ExpertUnits) for s in u.slices if s.tensor in buffers]


def _copies(names: Sequence[str], model: nn.Module) -> list[Tensor]:
    """Return copies of buffers of a model."""
    return [model.get_buffer(name).detach().clone() for name in names]


def _copies_of_cut(
    names: Sequence[str], sites: Mapping[str, Units], factors: Mapping[str, Tensor], model: nn.Module
) -> list[Tensor]:
    """Return what is left of buffers of a model when closed units are cut from it; the model stays as it is."""
    return _copies(names, cut(sharing(model), sites, factors)) if names else []


def _first_closed(n: int) -> Tensor:
    """Return gates of ``n`` units of which only the first is closed."""
    return (torch.arange(n) > 0).float()


def _last_closed(n: int) -> Tensor:
    """Return gates of ``n`` units of which only the last is closed."""
    return (torch.arange(n) < n - 1).float()


def _first_half_closed(n: int) -> Tensor:
    """Return gates of ``n`` units of which the first half is closed."""
    return (torch.arange(n) >= n // 2).float()


def _some_closed(n: int) -> Tensor:
    """Return random gates of ``n`` units of which at least one is closed and at least one is open."""
    gates = torch.ones(n)
    gates[torch.randperm(n)[: int(torch.randint(1, max(n, 2), ()))]] = 0.0
    return gates


def _every_other(n: int) -> Tensor:
    """Return gates of ``n`` units of which every other one is closed, the first one too."""
    return (torch.arange(n) % 2).float()


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within this context the model is in evaluation mode, or in training mode without the dropout of torch.

    Dropout would close whole samples, as draws are made comparable. In training mode the generators of Python and of
    numpy begin with the same number, too. Afterwards the model is in evaluation mode.
    """
    model.train(training)
    for module in model.modules():
        if isinstance(module, Dropout) and type(module).__module__ == nn.Dropout.__module__:
            module.eval()
    drawn = (random.getstate(), np.random.get_state()) if training else None
    if drawn is not None:
        random.seed(_SEED)
        np.random.seed(_SEED)
    try:
        yield
    finally:
        model.eval()
        if drawn is not None:
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])


def _comparable(tree: Any) -> list[Tensor]:
    """Return the real and complex numbers in what a model returned: in tensors, and in arrays of numpy.

    Integers are left out, and so are other objects, such as a cache of keys and values.
    """
    return [t.detach() for t in numbers_within(tree)]
