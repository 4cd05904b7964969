"""Finds the sites that make a comparison of masking and cutting fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from plasticnet.units import Units, family_of


class Stopped(str):
    """Why a model does not run, and where it stopped.

    Attributes:
        place: The place in the code of each function that was running. Where queries and keys are split into heads one
            after the other, both may fail with the same words.
    """

    place: tuple[int, ...] = ()


def stopped(reason: str, error: Exception) -> Stopped:
    """Return why a model does not run, with the place that an error comes from."""
    found = Stopped(reason)
    frame = error.__traceback__
    while frame is not None:
        found.place += (frame.tb_lasti,)
        frame = frame.tb_next
    return found


Comparison = Callable[[Mapping[str, Units]], str | None]  # returns why a comparison of these sites fails, or None
Repair = Callable[[Comparison, Mapping[str, Units]], dict[str, Units] | None]  # returns sites that pass, or None
_LARGE_FAMILY = 5  # a family with more members than this is judged by three of them


def culprits(differs: Comparison, sites: dict[str, Units], repair: Repair | None = None) -> dict[str, str]:
    """Find the sites that make a comparison fail, so that all others pass it together.

    Layers come in families (``blocks.0.mlp``, ``blocks.1.mlp``, ...). A family that fails is repaired if it can be.
    Otherwise its members are bisected. A large family whose first, middle and last member fail is given up as a whole,
    because trying every member of a deep model takes minutes.

    Args:
        differs: The comparison.
        sites: The sites by name. Those of a family that was repaired are replaced in this dict.
        repair: What repairs a family, given the comparison and the family: it returns sites that pass, to be used
            instead, or None.

    Returns:
        The reason that was seen, for each site that fails. If the other sites still fail together, all sites are in it.
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
            for n in family:  # the repaired family may have fewer sites: tied ones become a single site
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
    """Return the culprits, with reasons, among sites that fail together for ``reason``."""
    names = list(sites)
    if len(names) == 1:
        return {names[0]: reason}
    bad: dict[str, str] = {}
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        half = {n: sites[n] for n in part}
        half_reason = differs(half)
        if half_reason is not None:
            bad.update(_bisect(differs, half, half_reason))
    return bad or dict.fromkeys(names, reason)  # where both halves pass and the whole fails, no site is safe
