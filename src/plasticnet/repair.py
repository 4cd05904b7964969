"""Repair: find the attributes that must follow a site's size, by value, and check them by running.

Attention needs its number of heads, a split its sizes, a view its width. Such integers lie on the
modules around the site; which of them forward reads is found out by changing them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations

from torch import nn

from plasticnet.attributes import candidates
from plasticnet.units import Units, Width

Comparison = Callable[[Mapping[str, Units]], str | None]
_TOGETHER = 3  # attributes that are tried in every combination of this many


def repaired(model: nn.Module, differs: Comparison, family: Mapping[str, Units]) -> dict[str, Units] | None:
    """The sites of a family of layers as they are exact, or None: with attributes that follow their
    size, or else tied, unit by unit, to one site of all layers.

    The attributes are sought for one member, the largest, and then taken for all.
    """
    if not all(u.slices for u in family.values()):  # blocks have no width
        return None
    name = max(family, key=lambda n: family[n].size)
    for widths in _choices(candidates(model, family[name])):
        fixed = _with(model, family, widths)
        if widths and differs({name: fixed[name]}) is None and differs(fixed) is None:
            return fixed
        tied = _tied(fixed)
        if tied is not None and differs(tied) is None:
            return tied
    return None


def _with(model: nn.Module, family: Mapping[str, Units], widths: tuple[Width, ...]) -> dict[str, Units]:
    """Every member with the attributes that were found for one."""
    kinds = {_kind(w) for w in widths}
    return {
        n: replace(u, widths=tuple(w for w in candidates(model, u) if _kind(w) in kinds)) if kinds else u
        for n, u in family.items()
    }


def _tied(family: Mapping[str, Units]) -> dict[str, Units] | None:
    """One site for layers that share something of the size of theirs (T5 hands a bias for all heads
    from the first layer to the others). None where they cannot be tied."""
    first, *others = family.values()
    places = [(s.tensor, s.dim) for u in family.values() for s in u.slices]
    if not others or any(u.size != first.size for u in others) or len(set(places)) < len(places):
        return None
    members = family.values()
    tied = replace(
        first,
        slices=[s for u in members for s in u.slices],
        consumers=[c for u in members for c in u.consumers],
        norms=[n for u in members for n in u.norms],
        widths=tuple(w for u in members for w in u.widths),
    )
    return {first.name: tied}


def _choices(found: list[Width]) -> list[tuple[Width, ...]]:
    """Few attributes before many: one that is changed without need may be wrong elsewhere."""
    counts = [n for n in range(len(found) + 1) if n <= _TOGETHER or n == len(found)]
    return [choice for n in counts for choice in combinations(found, n)]


def _kind(width: Width) -> tuple[str, str, int | None]:
    return re.sub(r"\d+", "#", width.module), width.attribute, width.place
