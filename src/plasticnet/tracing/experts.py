"""Finds the experts of mixtures, which can be closed and cut as a whole, each with its row of the router."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.layers.experts import Experts
from plasticnet.tools.torch_private import children_of, parameters_of
from plasticnet.units import CHOICE, BlockUnits, ExpertUnits, Norm, Slice, Units, Width, family_of, owner


def find_experts(
    model: nn.Module, patterns: Sequence[str], sites: Mapping[str, Units], uses: Mapping[str, float]
) -> tuple[dict[str, ExpertUnits], dict[str, str]]:
    """Return a site for each list or stack of experts whose name matches, and the reasons why there are no others.

    Args:
        model: The model.
        patterns: Name patterns of lists of modules, and of modules with stacked parameters.
        sites: The sites that tracing has found.
        uses: How often each entry of a parameter is multiplied for one sample, by the name of the parameter.

    Returns:
        The sites, ``experts.members`` for ``experts``; and for every other module that matches, the reason.

    Raises:
        PlasticError: A pattern matches no module.
    """
    names = [n for n, _ in model.named_modules() if n and any(fnmatchcase(n, p) for p in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            known = ", ".join(n for n, m in model.named_modules() if n and _is_list(m))
            raise PlasticError(f"experts={pattern!r} matches no module; the lists of modules are: {known or 'none'}")
    found: dict[str, ExpertUnits] = {}
    reasons: dict[str, str] = {}
    for name in names:
        others = {**sites, **found}
        first = next(variants(model, name, others), None) or next(variants(model, name, {}), None)
        reason = _trouble(model, name, first, others)
        if reason is not None or first is None:
            reasons[name] = reason or "no experts"
        else:
            found[first.name] = replace(first, sparse=_is_sparse(model, first, uses))
    return found, reasons


def variants(model: nn.Module, name: str, sites: Mapping[str, Units]) -> Iterator[ExpertUnits]:
    """Yield what the experts of this name may be, the likeliest first.

    They differ in the parameter that is taken to be the router's, and in the attributes that follow their number. The
    self-check finds out which of them is right.

    Args:
        model: The model.
        name: The name of a list of modules, or of a module with stacked parameters.
        sites: The other sites, whose units have places of their own: a layer may be as wide as there are experts.
    """
    taken = {(s.tensor, s.dim) for u in sites.values() for s in u.slices}
    count, blocks, stacks = _members(model, name)
    inside = stacks or [n for n, _ in model.named_parameters() if n.startswith(f"{name}.")]
    within = [name, *_above(name)] if stacks else _above(name)
    above = next((a for a in within if _routers(model, a, inside, count)), None) if count > 1 else None
    if above is None:
        return
    routers = _routers(model, above, inside, count)
    beside = [t for t, p in _outside(model, above, inside) if p.dim() == 1 and len(p) == count]
    for rows, chosen in _rows(model, routers, beside):
        where = dict.fromkeys([*rows, *((t, 0) for t in stacks)])
        if taken.intersection(where):
            continue
        slices = [Slice(t, d, np.arange(count)[:, None], (1,)) for t, d in where]
        norms = [Norm(above, -1, t, d, CHOICE) for t, d in chosen]
        site = ExpertUnits(
            f"{name}.members", count, slices, norms=norms, growable=False, blocks=blocks,
            ends=(None,) * count, listed=not stacks,
        )  # fmt: skip
        for widths in _widths(model, name, above, count):
            yield replace(site, widths=widths)


_Places = tuple[tuple[str, int], ...]  # parameters and buffers, each with the dimension of the experts


def _rows(
    model: nn.Module, routers: Sequence[tuple[str, int]], beside: Sequence[str]
) -> Iterator[tuple[_Places, _Places]]:
    """Yield what may have an entry for each expert, and those of them by which a router chooses; the likeliest first.

    Some routers choose by biased scores. Where several tasks share the experts, each has a router of its own.

    Args:
        model: The model.
        routers: The matrices that may be a router's, each with its dimension of the experts.
        beside: The vectors with an entry for each expert.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    routers = sorted(routers, key=lambda r: r[1])
    listed = _together(routers, lambda r: (shapes[r[0]], r[1], family_of(r[0])))
    others = [group for group in _together(routers, lambda r: (shapes[r[0]], r[1])) if group not in listed]
    shared = {group: (*group, *_first([t for t in beside if owner(t) in _owners(group)])) for group in listed + others}
    yield from ((shared[group], shared[group]) for group in listed)
    for router, dim in routers:
        own = [t for t in beside if owner(t) == owner(router)]
        for rows in dict.fromkeys((((router, dim), *_first(own)), (*routers, *_first(beside)))):
            yield rows, ((router, dim), *(r for r in rows if r[0] in beside))
    yield from ((shared[group], shared[group]) for group in others)


def _together(places: Iterable[tuple[str, int]], key: Callable[[tuple[str, int]], object]) -> list[_Places]:
    """Return the groups of two and more places that have a key in common."""
    groups: dict[object, list[tuple[str, int]]] = {}
    for place in places:
        groups.setdefault(key(place), []).append(place)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _owners(places: _Places) -> set[str]:
    """Return the names of the modules that own tensors."""
    return {owner(t) for t, _ in places}


def _is_list(module: nn.Module) -> bool:
    """Return whether a module is a plain list or dict of modules, from which some can be taken."""
    return type(module) in (nn.ModuleList, nn.ModuleDict, Experts)


def _members(model: nn.Module, name: str) -> tuple[int, tuple[str, ...], list[str]]:
    """Return how many experts there are, their names, and the parameters in which they are stacked, if they are."""
    module = model.get_submodule(name)
    if _is_list(module):
        blocks = tuple(f"{name}.{key}" for key in children_of(module))
        return len(blocks), blocks, []
    held = {f"{name}.{leaf}": p for leaf, p in parameters_of(module).items() if p is not None}
    lengths = {len(p) for p in held.values() if p.dim() == 3}
    if len(lengths) != 1:
        return 0, (), []
    (count,) = lengths
    stacks = [t for t, p in held.items() if p.dim() == 3 or (p.dim() == 2 and len(p) == count)]
    return count, tuple(f"{name}[{i}]" for i in range(count)), stacks


def _outside(model: nn.Module, above: str, inside: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a module, by name, but for those that belong to the experts within it."""
    prefix = f"{above}." if above else ""
    module = model.get_submodule(above)
    held = [(f"{prefix}{t}", p) for t, p in (*module.named_parameters(), *module.named_buffers())]
    return [(t, p) for t, p in held if t not in inside]


def _routers(model: nn.Module, above: str, inside: Sequence[str], count: int) -> list[tuple[str, int]]:
    """Return the matrices beside the experts that may be a router's, each with its dimension of the experts."""
    found: list[tuple[str, int]] = []
    for tensor, p in _outside(model, above, inside):
        if isinstance(p, nn.Parameter) and p.dim() == 2 and count in p.shape:
            found.append((tensor, 0 if p.shape[0] == count else 1))
    return found


def _above(name: str) -> list[str]:
    """Return the names of the modules that contain a module, from the inside to the model itself."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


def _first(tensors: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Return the first dimension of each of these tensors."""
    return tuple((t, 0) for t in tensors)


def _widths(model: nn.Module, name: str, above: str, count: int) -> list[tuple[Width, ...]]:
    """Return which attributes may follow the number of experts: those that are called so, all that equal it, none."""
    every: list[Width] = []
    prefix = f"{above}." if above else ""
    for inner, module in model.get_submodule(above).named_modules():
        full = f"{prefix}{inner}".rstrip(".")
        if not f"{full}.".startswith(f"{name}.") or full == name:
            held = {a: v for a, v in vars(module).items() if not type(module).__module__.startswith("torch.nn.")}
            named = [a for a, v in held.items() if type(v) is int and v == count and not a.startswith("_")]
            every += [Width(full, a, 1) for a in named]
    called = tuple(w for w in every if "expert" in w.attribute)
    return list(dict.fromkeys((called, tuple(every), ())))


def _is_sparse(model: nn.Module, units: ExpertUnits, uses: Mapping[str, float]) -> bool:
    """Return whether rows go to some of the experts only, judging by how often these are used beside the router."""
    weights = [n for n, p in model.named_parameters() if p.dim() > 1 and units.inside(n) is not None]
    if not units.listed:
        weights = [s.tensor for s in units.slices if owner(s.tensor) == units.name.rpartition(".")[0]]
    return any(uses.get(t, 0.0) < uses.get(units.norms[0].tensor, 0.0) for t in weights)


def _trouble(model: nn.Module, name: str, first: ExpertUnits | None, sites: Mapping[str, Units]) -> str | None:
    """Return why experts cannot be units, as far as the model shows it without a run, or None."""
    if _members(model, name)[0] < 2:
        return (
            "experts are two or more modules of a plain nn.ModuleList or nn.ModuleDict, or lie in parameters of three "
            "dimensions"
        )
    if first is None:
        return "nothing around the experts has a matrix with a row for each of them, as a router has"
    for other, u in sites.items():
        if isinstance(u, BlockUnits) and u.inside(name) is not None:
            return "it lies in a block, which is a unit as a whole"
        if any((s.tensor, s.dim) == (t.tensor, t.dim) for s in u.slices for t in first.slices):
            return f"the site {other!r} has units in the same places"
    places = [(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)]
    for block in first.blocks:
        own = {p for p, n in places if n.startswith(f"{block}.")}
        shared = next((n for p, n in places if p in own and not n.startswith(f"{block}.")), None)
        if shared is not None:
            return f"an expert shares a parameter with {shared}, outside of it"
    return None
