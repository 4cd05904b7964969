"""Self-check: close random units on a randomised copy and compare masked with cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plasticnet import resize
from plasticnet.compact import cut, lengths
from plasticnet.gating import Gating
from plasticnet.repair import Comparison, repaired
from plasticnet.snapshot import duplicate, sharing, side_effect_free
from plasticnet.tracing import copy_inputs, is_large
from plasticnet.trees import tensors_within
from plasticnet.units import BlockUnits, InputUnits, Trace, Units, family_of

_LARGE_FAMILY = 5
_ATTEMPTS = 3  # with other random parameters, where units had no effect (all behind a dead ReLU, say)
_DRAWN = 1_000_003
_FINE, _ROUGH = 2e-6, 1e-3  # tolerances in double precision (some norms compute in single inside) and in others
_FEW = 3  # units of a site that a large model keeps
_DISAGREE = "cutting its units changes the output: the model uses its width in a way that tracing cannot see"
_BLIND = "closing its units does not move the output, so that the check cannot vouch for it"
CLOSED_SHARES = (0.3, 0.8)  # 0.3 alone misses errors that show only when most units are gone


def self_check(model: nn.Module, traced: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """The trace without the sites that masking and cutting disagree on; those are frozen.

    On the meta device there is nothing to compare: the trace is returned as it is, unchecked.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not traced.sites or any(t.is_meta for t in tensors):
        return traced
    with side_effect_free(model):
        found = _trial(model, traced, args, kwargs, seed=0)
        for seed in range(1, _ATTEMPTS):
            if _BLIND in found.frozen.values():
                found = _trial(model, traced, args, kwargs, seed)
    return replace(found, frozen={**traced.frozen, **found.frozen}, checked=True)


def _trial(model: nn.Module, traced: Trace, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> Trace:
    """The sites that pass, with the attributes that must follow them, and the reasons against the others.

    A large model is compared once, with most of its units closed; the rest is done with what is left
    of it then, which has the same layers and is quick to run.
    """
    torch.default_generator.manual_seed(seed)
    twin = duplicate(model, _random).eval()
    with torch.no_grad():
        for name, b in twin.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                b.uniform_(0.5, 1.5)
    sites = dict(traced.sites)
    if is_large(twin):
        rough = _Run(twin, args, kwargs, _ROUGH, [partial(_random_gates, share=CLOSED_SHARES[-1])], vouch=False)
        bad = _culprits(rough.cut_differs, sites, partial(repaired, twin))
        sites = {n: u for n, u in sites.items() if n not in bad}
        twin, current = _narrowed(twin, sites)
        run = _precise(twin, args, kwargs, traced)
        bad |= _culprits(run.cut_differs, dict(current))
    else:
        run, current = _precise(twin, args, kwargs, traced), sites
        bad = _culprits(run.cut_differs, sites, partial(repaired, run.model))
    good = {n: sites[n] for n in traced.sites if n in sites and n not in bad}
    stuck = _culprits(run.growth_differs, {n: current[n] for n in good})
    good = {n: replace(u, growable=u.growable and n not in stuck) for n, u in good.items()}
    for n in [n for n, u in good.items() if u.size == 1 and not u.growable and not isinstance(u, BlockUnits)]:
        bad[n] = "all its channels form a single unit, which can be neither cut nor added to"
        del good[n]
    return replace(traced, sites=good, frozen=bad)


def _narrowed(model: nn.Module, sites: Mapping[str, Units]) -> tuple[nn.Module, dict[str, Units]]:
    """The model with most units of every site cut, and the sites as they are then."""
    kept = {
        n: sorted(torch.randperm(u.size)[: max(_FEW, u.size // 20)].tolist())
        for n, u in sites.items()
        if not isinstance(u, BlockUnits)
    }
    small = sharing(model)
    planned = resize.plan(sites, lengths(small), kept)
    resize.apply(small, planned, {})
    return small, planned.units


def _precise(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], traced: Trace) -> _Run:
    """The comparison in double precision, where the model runs in it."""
    patterns = [partial(_random_gates, share=share) for share in CLOSED_SHARES]
    if traced.positional:  # a shift by one shows whatever takes units by their position
        patterns[:0] = [partial(_one_closed, place=0), partial(_one_closed, place=-1)]

    def double(t: Any) -> Any:
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            return t
        return t.to(torch.complex128 if t.is_complex() else torch.float64)

    try:
        precise = duplicate(twin)._apply(double)
        precise_args, precise_kwargs = tree_map(double, (args, kwargs))
        run = _Run(precise, precise_args, precise_kwargs, _FINE, patterns, traced.trains_more)
        run.reference = run.outputs(precise)
        return run
    except Exception:  # whatever the model dislikes about double precision, it runs in its own
        return _Run(twin, args, kwargs, _ROUGH, patterns, traced.trains_more)


def _random(p: nn.Parameter) -> nn.Parameter:
    """Random values in the place of a parameter: for a matrix of variance 1 / fan in, for a vector around 1.

    Few are drawn, and then repeated: drawing a billion numbers takes long. Their number is prime, so
    that no two rows come out equal.
    """
    if not (p.is_floating_point() or p.is_complex()):
        return nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    drawn = torch.empty(min(p.numel(), _DRAWN), dtype=p.dtype, device=p.device)
    if p.dim() > 1 or p.is_complex():
        drawn.normal_(0, (p.shape[0] / max(p.numel(), 1)) ** 0.5)
    else:
        drawn.uniform_(0.5, 1.5)
    values = drawn.repeat(-(-p.numel() // max(len(drawn), 1)))[: p.numel()].view(p.shape)
    new = torch.empty_like(p, requires_grad=False).copy_(values)  # in the same memory format
    return nn.Parameter(new, requires_grad=p.requires_grad)


class _Run:
    """A model with random parameters, and its outputs: what masking and cutting are compared on."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tolerance: float,
        patterns: list[Callable[[int], Tensor]],
        training: bool = False,
        vouch: bool = True,
    ) -> None:
        """``patterns`` give the gates of a site of so many units; ``training`` compares in training mode
        too; ``vouch`` asks that closing units moves the output."""
        self.model, self.args, self.kwargs, self.tolerance = model, args, kwargs, tolerance
        self.patterns, self.training, self.vouch = patterns, training, vouch

    @cached_property
    def reference(self) -> list[Tensor]:
        """The outputs with all units open."""
        return self.outputs(self.model)

    def outputs(self, model: nn.Module, training: bool = False) -> list[Tensor]:
        """What the model returns, as it is in evaluation or (without dropout) in training."""
        args, kwargs = copy_inputs((self.args, self.kwargs))
        with torch.no_grad(), _mode(model, training):
            return _comparable(model(*args, **kwargs))

    def masked(self, sites: Mapping[str, Units], factors: Mapping[str, Tensor], training: bool = False) -> list[Tensor]:
        """The outputs with the gates multiplied in, nothing cut."""
        z = torch.cat([*factors.values(), next(iter(factors.values())).new_ones(1)])
        args, kwargs = copy_inputs((self.args, self.kwargs))
        with side_effect_free(self.model), _mode(self.model, training):
            return _comparable(Gating(sites, self.model).run(z, args, kwargs))

    def cut_differs(self, sites: Mapping[str, Units]) -> str | None:
        """Why masking and cutting differ for these sites, or None if they agree."""
        device = next(self.model.parameters()).device
        for pattern in self.patterns:
            last = pattern is self.patterns[-1]
            factors = {
                n: (torch.zeros(u.size) if last and isinstance(u, BlockUnits) else pattern(u.size)).to(device)
                for n, u in sites.items()
            }
            try:
                small = cut(sharing(self.model), sites, factors)
                compared = self.outputs(small)
                trained = self.outputs(small, training=True) if self.training else []
            except Exception as error:  # a forward that hard-codes a width can fail in any way
                what = str(error).splitlines()[0][:200] if str(error) else repr(error)
                return f"the model does not run when units are cut: {what}"
            masked = self.masked(sites, factors)
            if not _close(masked, compared, self.tolerance):
                return _DISAGREE
            if self.training and not _close(self.masked(sites, factors, training=True), trained, self.tolerance):
                return _DISAGREE
            if not masked:
                return "the model has no floating-point output to compare"
            closed = any((f == 0).any() for f in factors.values())
            if last and self.vouch and closed and all(map(torch.equal, self.reference, masked)):
                return _BLIND
        return None

    def growth_differs(self, sites: Mapping[str, Units]) -> str | None:
        """Whether function-preserving growth of these sites moves the output, or fails."""
        sources = {n: [*range(u.size), -1] for n, u in sites.items() if u.growable and not isinstance(u, InputUnits)}
        try:
            grown = sharing(self.model)
            resize.apply(grown, resize.plan(sites, lengths(grown), sources), {})
            if not _close(self.reference, self.outputs(grown), self.tolerance):
                return "growing its units changes the output"
        except Exception as error:  # a forward that hard-codes a width can fail in any way
            return f"the model does not run when units are added: {error}"
        return None


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Evaluation, or training in which nothing is random: dropout would differ between widths."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        yield
    finally:
        model.eval()


Repair = Callable[[Comparison, Mapping[str, Units]], dict[str, Units] | None]


def _culprits(differs: Comparison, sites: dict[str, Units], repair: Repair | None = None) -> dict[str, str]:
    """The sites that fail a comparison, with what was seen; the others pass it together. ``repair``
    may replace the sites of a family by some that pass.

    Layers come in families (``blocks.0.mlp``, ``blocks.1.mlp``, ...). A large one whose first, middle
    and last member fail is given up as a whole: trying every member of a deep model takes minutes.
    """
    if not sites or differs(sites) is None:
        return {}
    bad: dict[str, str] = {}
    families: dict[str, dict[str, Units]] = {}
    for name, u in sites.items():
        families.setdefault(family_of(name), {})[name] = u
    for family in families.values():
        names = list(family)
        reason = differs(family)
        better = repair(differs, family) if repair and reason is not None else None
        if better is not None:
            for n in family:  # a tied family is one site
                del sites[n]
            sites.update(better)
            continue
        if reason is None:
            continue
        probes = [names[0], names[len(names) // 2], names[-1]] if len(names) > _LARGE_FAMILY else []
        if probes and all(differs({n: sites[n]}) is not None for n in probes):
            bad.update(dict.fromkeys(names, reason))
        else:
            bad.update(_bisect(differs, family, reason))
    rest = {n: u for n, u in sites.items() if n not in bad}
    reason = differs(rest) if rest else None
    if reason is None:
        return bad
    bad.update(_bisect(differs, rest, reason))
    rest = {n: u for n, u in rest.items() if n not in bad}
    reason = differs(rest) if rest else None
    return bad if reason is None else dict.fromkeys(sites, reason)


def _bisect(differs: Comparison, sites: Mapping[str, Units], reason: str) -> dict[str, str]:
    """The culprits among sites that fail together for ``reason``."""
    names = list(sites)
    if len(names) == 1:
        return {names[0]: reason}
    bad: dict[str, str] = {}
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        half = {n: sites[n] for n in part}
        half_reason = differs(half)
        if half_reason is not None:
            bad.update(_bisect(differs, half, half_reason))
    return bad or dict.fromkeys(names, reason)  # they disagree only together: none of them is safe


def _random_gates(units: int, share: float) -> Tensor:
    """0 for about ``share`` of the units, 1 for an odd number of them: an even one can agree with a
    hard-coded width by luck, and a single one broadcasts, so that it serves for the second share only."""
    count = round(units * (1 - share))
    if count % 2 == 0 and units != 3:
        count += 1 if count + 1 < units else -1
    gates = torch.zeros(units)
    gates[torch.randperm(units)[: max(count, 1)]] = 1.0
    return gates


def _one_closed(units: int, place: int) -> Tensor:
    gates = torch.ones(units)
    if units > 1:
        gates[place] = 0.0
    return gates


def _close(expected: list[Tensor], found: list[Tensor], tolerance: float) -> bool:
    """Whether outputs agree, up to a share of the largest entry of each."""
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return False
        a, b = a[a.isfinite()], b[b.isfinite()]  # a mask may write -inf
        if a.numel() and not (a - b).abs().max().item() <= tolerance * max(a.abs().max().item(), 1e-300):
            return False
    return True


def _comparable(tree: Any) -> list[Tensor]:
    """The outputs of real or complex numbers; objects such as a memory of keys and values are none."""
    return [t for t in tensors_within(tree) if t.is_floating_point() or t.is_complex()]
