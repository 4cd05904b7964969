"""Finds the sites that make a comparison of masking and cutting fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from plasticnet.units import Units, family_of

Comparison = Callable[[Mapping[str, Units]], str | None]  # why masking and cutting of these sites differ, or None
Repair = Callable[[Comparison, Mapping[str, Units]], dict[str, Units] | None]  # sites that pass in place of a family
_LARGE_FAMILY = 5  # members, above which three of them are tried for all


def culprits(differs: Comparison, sites: dict[str, Units], repair: Repair | None = None) -> dict[str, str]:
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
