"""Self-check: close random units on a randomised copy and compare masked with cut."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from plasticnet import resize
from plasticnet.compact import cut, lengths
from plasticnet.gates import fold, gated, readers
from plasticnet.snapshot import side_effect_free
from plasticnet.tracing import copy_inputs
from plasticnet.units import InputUnits, Trace, Units

_LARGE_FAMILY = 5
_ATTEMPTS = 3  # with other random parameters, where units had no effect (all behind a dead ReLU, say)
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
        bad, stuck = _trial(model, traced.sites, args, kwargs, seed=0)
        for seed in range(1, _ATTEMPTS):
            if _BLIND in bad.values():
                bad, stuck = _trial(model, traced.sites, args, kwargs, seed)
    sites = {n: replace(u, growable=n not in stuck) for n, u in traced.sites.items() if n not in bad}
    return Trace(sites, {**traced.frozen, **bad}, traced.uses, checked=True)


def _trial(
    model: nn.Module, sites: Mapping[str, Units], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> tuple[dict[str, str], dict[str, str]]:
    """The sites that cannot be cut, and those of the others that cannot be grown, with the reasons."""
    torch.default_generator.manual_seed(seed)
    twin, args, kwargs, tolerance = _randomised(model, args, kwargs)
    bad = _culprits(partial(_cut_differs, twin, args, kwargs, tolerance), sites)
    good = {n: u for n, u in sites.items() if n not in bad}
    return bad, _culprits(partial(_growth_differs, twin, args, kwargs, tolerance), good)


def _randomised(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], float]:
    """A copy with random parameters (zero-initialised heads and norms hide errors), in double
    precision where the model runs in it."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in twin.parameters():
            if p.dim() > 1 and p.is_floating_point():
                p.normal_(0, (p.shape[0] / max(p.numel(), 1)) ** 0.5)
            elif p.is_floating_point():
                p.uniform_(0.5, 1.5)
        for name, b in twin.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                b.uniform_(0.5, 1.5)

    def double(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    try:
        precise = copy.deepcopy(twin).double()
        precise_args, precise_kwargs = tree_map(double, (args, kwargs))
        _run(precise, precise_args, precise_kwargs)
    except Exception:  # whatever the model dislikes about double precision, it runs in its own
        return twin, args, kwargs, 1e-3
    return precise, precise_args, precise_kwargs, 1e-8


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    args, kwargs = copy_inputs((args, kwargs))
    with torch.no_grad():
        return _floating(model(*args, **kwargs))


Comparison = Callable[[Mapping[str, Units]], str | None]


def _culprits(differs: Comparison, sites: Mapping[str, Units]) -> dict[str, str]:
    """The sites that fail a comparison, with what was seen; the others pass it together.

    Layers come in families (``blocks.0.mlp``, ``blocks.1.mlp``, ...). A large one whose first, middle
    and last member fail is given up as a whole: trying every member of a deep model takes minutes.
    """
    if not sites or differs(sites) is None:
        return {}
    bad: dict[str, str] = {}
    families: dict[str, dict[str, Units]] = {}
    for name, u in sites.items():
        families.setdefault(re.sub(r"\d+", "#", name), {})[name] = u
    for family in families.values():
        names = list(family)
        reason = differs(family)
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


def _growth_differs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float, sites: Mapping[str, Units]
) -> str | None:
    """Whether function-preserving growth of these sites moves the output, or fails."""
    grown = copy.deepcopy(model)
    sources = {n: [*range(u.size), -1] for n, u in sites.items() if not isinstance(u, InputUnits)}
    try:
        resize.apply(grown, resize.plan(sites, lengths(grown), sources), {})
        for a, b in zip(_run(model, args, kwargs), _run(grown, args, kwargs), strict=True):
            if not _close(a, b, tolerance):
                return "growing its units changes the output"
    except Exception as error:  # a forward that hard-codes a width can fail in any way
        return f"the model does not run when units are added: {error}"
    return None


def _random_gates(units: int, share: float) -> Tensor:
    """0 for about ``share`` of the units, 1 for an odd number of them: an even one can agree with a
    hard-coded width by luck."""
    gates = (torch.rand(units) >= share).float()
    if int(gates.sum()) % 2 == 0:
        place = int(torch.randint(units, ()))
        gates[place] = 1.0 - gates[place]
    return gates


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = max(a.abs().max().item(), 1e-300) if a.numel() else 1.0
    return a.shape == b.shape and (not a.numel() or (a - b).abs().max().item() <= tolerance * scale)


def _cut_differs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float, sites: Mapping[str, Units]
) -> str | None:
    """Why masking and cutting differ for these sites, or None if they agree."""
    reference = _run(model, args, kwargs)
    if not reference:
        return "the model has no floating-point output to compare"
    for share in CLOSED_SHARES:
        factors = {n: _random_gates(u.size, share).to(reference[0]) for n, u in sites.items()}
        try:
            compared = _run(cut(copy.deepcopy(model), sites, factors), args, kwargs)
        except Exception as error:  # a forward that hard-codes a width can fail in any way
            what = str(error).splitlines()[0][:200] if str(error) else repr(error)
            return f"the model does not run when units are cut: {what}"
        masked = _masked(model, sites, factors, args, kwargs)
        if not all(_close(a, b, tolerance) for a, b in zip(masked, compared, strict=True)):
            return "cutting its units changes the output: the model uses its width in a way that tracing cannot see"
        moved = any(not torch.equal(full, a) for full, a in zip(reference, masked, strict=True))
        if share == CLOSED_SHARES[-1] and not moved and any((f == 0).any() for f in factors.values()):
            return _BLIND
    return None


def _masked(
    model: nn.Module,
    sites: Mapping[str, Units],
    factors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """The outputs with the gates multiplied in, nothing cut."""
    z = torch.cat([*factors.values(), next(iter(factors.values())).new_ones(1)])
    found = readers(sites, model)
    args, kwargs = copy_inputs((args, kwargs))
    with gated(model, found, None), torch.no_grad():
        return _floating(functional_call(model, fold(model, found, z), args, kwargs))


def _floating(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]
