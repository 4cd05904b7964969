"""Repair: find the attributes that must follow a site's size, by value, and check them by running.

Attention needs its number of heads, a split its sizes, a view its width. Such integers lie on the
modules around the site; which of them forward reads is found out by changing them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from plasticnet.checking.culprits import Comparison
from plasticnet.surgery.attributes import candidates
from plasticnet.units import Units, Width, family_of

Kind = tuple[str, str, int | None]  # an attribute, wherever in a family of layers it is
_DEPTH = 3  # attributes that are changed together at most
_TRIALS = 40  # sets of attributes that are tried for one site


def repaired(model: nn.Module, differs: Comparison, family: Mapping[str, Units]) -> dict[str, Units] | None:
    """The sites of a family of layers as they are exact, or None: with attributes that follow their
    size, or else tied, unit by unit, to one site of all layers.

    The attributes are sought for one member, the largest that fails, and then taken for all.
    """
    if not all(u.slices for u in family.values()):  # blocks have no width
        return None
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
    """Sets of attributes without which there is trouble, small ones first: one that is changed without
    need may be wrong elsewhere. A set is only extended if its last attribute made the trouble another."""
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
    """Every member with the attributes of these kinds."""
    return {n: replace(u, widths=tuple(w for w in found[n] if _kind(w) in kinds)) for n, u in family.items()}


def _tied(family: Mapping[str, Units]) -> dict[str, Units]:
    """One site for layers that share something of the size of theirs (T5 hands a bias for all heads
    from the first layer to the others); nothing where they cannot be tied."""
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
    )
    return {first.name: tied}


def _kind(width: Width) -> Kind:
    return family_of(width.module), width.attribute, width.place
