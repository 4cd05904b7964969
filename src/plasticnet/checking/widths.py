"""Repairs sites: finds the attributes of modules that must follow the size of a site.

Attention needs its number of heads, a split needs its sizes, and a view its width. Such integers are attributes of the
modules around the site. They are found by their value. Which of them the forward reads is found out by changing them
and running the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from plasticnet.checking.culprits import Comparison, Stopped
from plasticnet.surgery.attributes import candidates
from plasticnet.units import Units, Width, family_of

# The same attribute in all layers of a family: the family of its modules, its name, and its place.
Kind = tuple[str, str, int | str | None]
Kinds = Callable[[Width, str], Kind]  # the kind of an attribute, for the name of the site that it follows
_DEPTH = 4  # the most attributes that are changed together
_TRIALS = 100  # the most sets of attributes that are tried for one site
_FEW = 4  # the most members of a family that are repaired each by itself


def repaired(model: nn.Module, differs: Comparison, family: Mapping[str, Units]) -> dict[str, Units] | None:
    """Repair the sites of a family of layers for which masking and cutting disagree.

    First, norms are taken to read the number of their channels from a shape. Then attributes are sought that must
    follow the size of a site. The search is done for one member, the largest that fails, and its result is used for all
    members. If that fails, each member of a small family is repaired by itself. If that fails, too, the sites of all
    layers are tied, unit by unit, to a single site.

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
    solved = False
    for kind in _ways(found) if name is not None else ():
        assert name is not None
        own = dict.fromkeys(kind(w, name) for w in found[name])
        for kinds in _search(list(own), partial(_trouble, differs, family, found, kind, name)):
            solved, fixed = True, _with(family, found, kinds, kind)
            if differs(fixed) is None:
                return fixed
    apart = _apart(differs, family, found) if solved and len(family) <= _FEW else None
    if apart is not None and differs(apart) is None:
        return apart
    tied = _tied(family)
    outside = {n: candidates(model, u, outside=True) for n, u in tied.items()}
    for n, widths in outside.items():
        own = dict.fromkeys(_by_family(w, n) for w in widths)
        for kinds in _search(list(own), lambda kinds: differs(_with(tied, outside, kinds, _by_family))):
            return _with(tied, outside, kinds, _by_family)
    return None


def _apart(
    differs: Comparison, family: Mapping[str, Units], found: Mapping[str, list[Width]]
) -> dict[str, Units] | None:
    """Return the members of a family, each with the attributes that it needs by itself, or None if one finds none.

    Layers of a graph network may be alike but for the last one, which has a single head, and whose units are others.
    """
    fixed = dict(family)
    for name, u in family.items():
        if differs({name: u}) is not None:
            own = dict.fromkeys(_by_place(w, name) for w in found[name])
            kinds = next(_search(list(own), partial(_trouble, differs, family, found, _by_place, name)), None)
            if kinds is None:
                return None
            fixed[name] = _with(family, found, kinds, _by_place)[name]
    return fixed


def _trouble(
    differs: Comparison, family: Mapping[str, Units], found: Mapping[str, list[Width]], kind: Kinds, name: str,
    kinds: tuple[Kind, ...],
) -> str | None:  # fmt: skip
    """Return what is wrong with one member of a family while attributes of these kinds follow its size, or None."""
    return differs({name: _with(family, found, kinds, kind)[name]})


def _ways(found: Mapping[str, list[Width]]) -> list[Kinds]:
    """Return how attributes of layers correspond to one another: by their place beside each layer, and by family.

    Both are tried where they are not the same, as where one layer has the same attribute as the next one, or a list
    has an entry for each layer.
    """
    both = {(_by_place(w, n), _by_family(w, n)) for n, widths in found.items() for w in widths}
    alike = len(both) == len({place for place, _ in both}) == len({family for _, family in both})
    return [_by_family] if alike else [_by_place, _by_family]


def _search(kinds: Sequence[Kind], trouble: Callable[[tuple[Kind, ...]], str | None]) -> Iterator[tuple[Kind, ...]]:
    """Yield sets of attributes that remove the trouble, small ones first.

    Small sets come first because an attribute that is changed without need may be wrong elsewhere. A set is extended
    only if adding its last attribute has changed the trouble, or the place where the model stops.

    Args:
        kinds: The kinds of the attributes that may have to follow the size.
        trouble: Returns what is wrong while these attributes follow the size, or None.
    """
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
                elif now != before or _place(now) != _place(before):
                    extended.append((choice, now))
        level = extended


def _place(trouble: str | None) -> tuple[int, ...]:
    """Return the place where the model stops, or an empty one where it runs."""
    return trouble.place if isinstance(trouble, Stopped) else ()


def _with(
    family: Mapping[str, Units], found: Mapping[str, list[Width]], kinds: tuple[Kind, ...], kind: Kinds
) -> dict[str, Units]:
    """Return every member of the family with those of the attributes in ``found`` too that are of these kinds."""
    return {n: replace(u, widths=(*u.widths, *(w for w in found[n] if kind(w, n) in kinds))) for n, u in family.items()}


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


def _by_family(width: Width, _: str) -> Kind:
    """Return the kind of an attribute, which it shares with the same attribute of all other layers."""
    return family_of(width.module), width.attribute, width.place


def _by_place(width: Width, site: str) -> Kind:
    """Return the kind of an attribute, which it shares with the one that lies in the same way beside other layers.

    The numbers in the name of its module are compared with those in the name of the site. A place in a list may be such
    a number itself.
    """
    own = _numbers(site)
    steps = [n - m for n, m in zip(_numbers(width.module), own, strict=False)]
    place = f"#{own.index(width.place)}" if width.place in own else width.place
    return f"{family_of(width.module)}{steps}", width.attribute, place


def _numbers(name: str) -> list[int]:
    """Return the numbers in a name, in order."""
    return [int(n) for n in re.findall(r"\d+", name)]
