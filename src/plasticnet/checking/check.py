"""Self-check: close random units on a randomised copy and compare masked with cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plasticnet.checking.compare import BLIND, FINE, ROUGH, Comparing
from plasticnet.checking.culprits import culprits
from plasticnet.checking.widths import repaired
from plasticnet.surgery.plan import lengths, plan_resize
from plasticnet.surgery.rewrite import apply_plan
from plasticnet.tools.inputs import is_large
from plasticnet.tools.snapshot import duplicate, left_as_it_was, sharing
from plasticnet.tools.torch_private import convert
from plasticnet.units import BlockUnits, Trace, Units

_ATTEMPTS = 3  # with other random parameters, where units had no effect (all behind a dead ReLU, say)
_DRAWN = 1_000_003
_FEW = 3  # units of a site that a large model keeps
CLOSED_SHARES = (0.3, 0.8)  # 0.3 alone misses errors that show only when most units are gone


def self_check(model: nn.Module, traced: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """The trace without the sites that masking and cutting disagree on; those are frozen.

    On the meta device there is nothing to compare: the trace is returned as it is, unchecked.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not traced.sites or any(t.is_meta for t in tensors):
        return traced
    with left_as_it_was(model):
        found = _trial(model, traced, args, kwargs, seed=0)
        for seed in range(1, _ATTEMPTS):
            if BLIND in found.frozen.values():
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
        rough = Comparing(twin, args, kwargs, ROUGH, [partial(random_gates, share=CLOSED_SHARES[-1])], vouch=False)
        bad = culprits(rough.cut_differs, sites, partial(repaired, twin))
        sites = {n: u for n, u in sites.items() if n not in bad}
        twin, current = _narrowed(twin, sites)
        run = _precise(twin, args, kwargs, traced)
        bad |= culprits(run.cut_differs, dict(current))
    else:
        run, current = _precise(twin, args, kwargs, traced), sites
        bad = culprits(run.cut_differs, sites, partial(repaired, run.model))
    good = {n: sites[n] for n in traced.sites if n in sites and n not in bad}
    stuck = culprits(run.growth_differs, {n: current[n] for n in good})
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
    planned = plan_resize(sites, lengths(small), kept)
    apply_plan(small, planned, {})
    return small, planned.units


def _precise(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], traced: Trace) -> Comparing:
    """The comparison in double precision, where the model runs in it."""
    patterns = [partial(random_gates, share=share) for share in CLOSED_SHARES]
    if traced.positional:  # a shift by one shows whatever takes units by their position
        patterns[:0] = [partial(_one_closed, place=0), partial(_one_closed, place=-1)]

    def double(t: Any) -> Any:
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            return t
        return t.to(torch.complex128 if t.is_complex() else torch.float64)

    try:
        precise = convert(duplicate(twin), double)
        precise_args, precise_kwargs = tree_map(double, (args, kwargs))
        run = Comparing(precise, precise_args, precise_kwargs, FINE, patterns, traced.trains_more)
        run.reference = run.outputs(precise)
        return run
    except Exception:  # whatever the model dislikes about double precision, it runs in its own
        return Comparing(twin, args, kwargs, ROUGH, patterns, traced.trains_more)


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


def random_gates(units: int, share: float) -> Tensor:
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
