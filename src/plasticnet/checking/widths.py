"""Repairs sites: finds the attributes of modules that must follow the size of a site.

Attention needs its number of heads, a split needs its sizes, and a view its width. Such integers are attributes of the
modules around the site. They are found by their value. Which of them the forward reads is found out by changing them
and running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from plasticnet.checking.culprits import Comparison
from plasticnet.surgery.attributes import candidates
from plasticnet.units import Units, Width, family_of

Kind = tuple[str, str, int | None]  # the same attribute in all layers of a family: family of modules, name, place
_DEPTH = 4  # the most attributes that are changed together
_TRIALS = 100  # the most sets of attributes that are tried for one site


def repaired(model: nn.Module, differs: Comparison, family: Mapping[str, Units]) -> dict[str, Units] | None:
    """Repair the sites of a family of layers for which masking and cutting disagree.

    First, norms are taken to read the number of their channels from a shape. Then attributes are sought that must
    follow the size of a site. The search is done for one member, the largest that fails, and its result is used for all
    members. If that fails, the sites of all layers are tied, unit by unit, to a single site.

    Args:
        model: The model, which is left as it was.
        differs: Returns why masking and cutting of some sites differ, or None.
        family: The sites of the family, by name.

    Returns:
        Sites that pass the comparison, to be used instead of the family, or None where no repair was found.
    """
    if not all(u.slices for u in family.values()):  # blocks have no width
        return None
    counting = {n: replace(u, norms=[replace(norm, counts=True) for norm in u.norms]) for n, u in family.items()}
    if any(u.norms for u in family.values()) and differs(counting) is None:
        return counting
    found = {n: candidates(model, u) for n, u in family.items()}
    largest = sorted(family, key=lambda n: -family[n].size)
    name = next((n for n in largest if differs({n: family[n]}) is not None), None)
    if name is not None:
        for kinds in _search(found[name], lambda kinds: differs({name: _with(family, found, kinds)[name]})):
            fixed = _with(family, found, kinds)
            if differs(fixed) is None:
                return fixed
    tied = _tied(family)
    outside = {n: candidates(model, u, outside=True) for n, u in tied.items()}
    for widths in outside.values():
        for kinds in _search(widths, lambda kinds: differs(_with(tied, outside, kinds))):
            return _with(tied, outside, kinds)
    return None


def _search(found: list[Width], trouble: Callable[[tuple[Kind, ...]], str | None]) -> Iterator[tuple[Kind, ...]]:
    """Yield sets of attributes that remove the trouble, small ones first.

    Small sets come first because an attribute that is changed without need may be wrong elsewhere. A set is extended
    only if adding its last attribute has changed the trouble.

    Args:
        found: The attributes that may have to follow the size.
        trouble: Returns what is wrong while these attributes follow the size, or None.
    """
    kinds = list(dict.fromkeys(map(_kind, found)))
    seen: set[frozenset[Kind]] = set()
    level: list[tuple[tuple[Kind, ...], str | None]] = [((), None)]
    for _ in range(_DEPTH + 1):
        extended: list[tuple[tuple[Kind, ...], str | None]] = []
        for chosen, before in level:
            for choice in [(*chosen, k) for k in kinds if k not in chosen] if before is not None else [()]:
                if frozenset(choice) in seen or len(seen) >= _TRIALS:
                    continue
                seen.add(frozenset(choice))
                now = trouble(choice)
                if now is None:
                    yield choice
                elif now != before:
                    extended.append((choice, now))
        level = extended


def _with(family: Mapping[str, Units], found: Mapping[str, list[Width]], kinds: tuple[Kind, ...]) -> dict[str, Units]:
    """Return every member of the family with those of the attributes in ``found`` too that are of these kinds."""
    return {n: replace(u, widths=(*u.widths, *(w for w in found[n] if _kind(w) in kinds))) for n, u in family.items()}


def _tied(family: Mapping[str, Units]) -> dict[str, Units]:
    """Return a single site whose units are those of all layers in step, or nothing where that is impossible.

    Layers need this when they share a tensor of their common size. In T5 the first layer computes a bias for all heads
    and hands it to the others. Sites of different sizes, and sites that own the same dimension of a tensor, cannot be
    tied.
    """
    first, *others = family.values()
    places = [(s.tensor, s.dim) for u in family.values() for s in u.slices]
    if not others or any(u.size != first.size for u in others) or len(set(places)) < len(places):
        return {}
    members = family.values()
    tied = replace(
        first,
        slices=[s for u in members for s in u.slices],
        consumers=[c for u in members for c in u.consumers],
        norms=[n for u in members for n in u.norms],
        widths=tuple(w for u in members for w in u.widths),
    )
    return {first.name: tied}


def _kind(width: Width) -> Kind:
    """Return the kind of an attribute, which it shares with the same attribute of the other layers."""
    return family_of(width.module), width.attribute, width.place
