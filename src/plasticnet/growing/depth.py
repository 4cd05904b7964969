"""Which sites can grow at present, where some grow by blocks that sleep."""

from __future__ import annotations

from collections.abc import Mapping

from plasticnet.gates.site import Site
from plasticnet.net import PlasticNet
from plasticnet.units import BlockUnits


def is_depth(site: Site) -> bool:
    """Return whether the units of a site are whole blocks."""
    return isinstance(site.units, BlockUnits)


def growing_sites(net: PlasticNet, deeper: bool = True) -> dict[str, Site]:
    """Return the sites that can grow, by name: those that can get units, and those with blocks that sleep.

    What lies within a block that sleeps does not grow, because it is given the widths of other blocks when it wakes.

    Args:
        net: The network.
        deeper: Whether sites of blocks count.
    """
    return {
        name: site
        for name, site in net.sites.items()
        if (deeper and site.spare > 0 if is_depth(site) else site.units.growable and site.awake)
    }


def only_depth(net: PlasticNet, counts: Mapping[str, int]) -> dict[str, int]:
    """Return how many blocks open."""
    return {name: n for name, n in counts.items() if is_depth(net.sites[name])}
