"""How many units each site should get or lose, by what its units are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from plasticnet.gates.site import Site
from plasticnet.growing.depth import growing_sites, is_depth
from plasticnet.growing.rule import Priced
from plasticnet.growing.verdicts import ERRORS, Verdict, worth_over_price
from plasticnet.net import PlasticNet

# The worth of units falls with about this power of the width; docs/design/growth.md says why that need not be exact.
POWER = 4
# A site at most doubles, or is halved, at once.
FASTEST = 2.0
# Under a budget, units move from one site to another where widths are wrong by this factor or more.
UNEVEN = 1.2
# How often an interval is halved to find the largest factor of all widths that there is room for.
HALVINGS = 20


@dataclass(frozen=True)
class Moves:
    """Units that come, and units that leave. Blocks come, too: those that open. None of them leaves by growth.

    Attributes:
        added: How many units come, for each site that gets some.
        leaving: The places of the units that leave, for each site that loses some.
    """

    added: Mapping[str, int] = field(default_factory=dict)
    leaving: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.leaving)

    def allowed(self, net: PlasticNet, deeper: bool = True) -> Moves:
        """Return what of this the limits of the sites allow, with what sites lack that are below their minimum.

        Args:
            net: The network.
            deeper: Whether blocks may open.
        """
        added, leaving = dict[str, int](), dict[str, tuple[int, ...]]()
        growing = growing_sites(net, deeper)
        for name, site in net.sites.items():
            left = self.leaving.get(name, ())
            stay = site.awake - len(left)
            low, high = bounds(site)
            # Features that leave cannot come back at the same time, as new units do in the place of others.
            new = int(min(min(max(stay + self.added.get(name, 0), low), high) - stay, site.spare))
            new = max(new, 0) if name in growing else 0
            left = left[: len(left) - max(0, site.least - stay - new)]
            if left:
                leaving[name] = left
            if new:
                added[name] = new
        return Moves(added, leaving)

    def sources(self, net: PlasticNet) -> dict[str, list[int]]:
        """Return the units that stay, and -1 for each new one, as `PlasticNet.resize` takes them; not for blocks."""
        names = [name for name in {**self.added, **self.leaving} if not is_depth(net.sites[name])]
        left = {name: set(self.leaving.get(name, ())) for name in names}
        return {
            name: [*(i for i in range(len(net.sites[name])) if i not in gone), *[-1] * self.added.get(name, 0)]
            for name, gone in left.items()
        }


def bounds(site: Site) -> tuple[float, float]:
    """Return the smallest and the largest width that growth may give to a site; for blocks, how many may be open."""
    if is_depth(site):
        return max(site.least, site.awake), max(site.least, site.awake + site.room)
    return site.least, max(site.least, len(site) + site.room) if site.units.growable else len(site)


def grow_together(net: PlasticNet, found: Mapping[str, Verdict]) -> Moves:
    """Return how sites grow at prices that are known: all by the same factor, but those that are far too wide already.

    Worthless units leave as soon as others come. In a site that does not grow, others take their place.

    A site of blocks grows in the same way, but by what its own newest blocks are worth. While a network is small, units
    are worth far more than they cost, and their common factor would open all blocks before any has shown its worth.

    Args:
        net: The network.
        found: What the newest units of each site are worth, as far as that is beyond chance.
    """
    r = worth_over_price(found)
    factor = min(FASTEST, r ** (1 / POWER))
    # A site that is so far below the mean is already twice as wide as it should be beside the others.
    least = r / FASTEST**POWER if math.isfinite(r) else 0.0
    own = {name: _by_itself(v) if v.depth else factor for name, v in found.items()}
    widths = {name: net.sites[name].awake for name in found}
    counts = {
        name: round(own[name] * widths[name]) - widths[name] if v.worth > least * v.price else 0
        for name, v in found.items()
    }
    if not any(n > 0 for n in counts.values()):
        return Moves()
    added = {name: n or len(found[name].worthless) for name, n in counts.items()}
    return Moves({name: n for name, n in added.items() if n > 0}, {name: v.worthless for name, v in found.items()})


def even_out(net: PlasticNet, found: Mapping[str, Verdict], priced: Priced) -> Moves:
    """Return how sites grow within a budget on costs, and how they pass units on where there is no more room.

    All widths follow a common factor, the largest one that there is room for. Each width follows the worth of its own
    units besides, as far as that is beyond chance. Units that are not missed at all are replaced.

    Args:
        net: The network.
        found: What the units of each site are worth.
        priced: What says how much room there is.
    """
    # What a site with no room is worth says nothing about how the others share what is left.
    r = worth_over_price({n: v for n, v in found.items() if net.sites[n].room} or found)
    own = {name: _beyond_chance(v, r) for name, v in found.items()}

    def changes(common: float, slowest: float = 1 / FASTEST) -> dict[str, int]:
        counts = {}
        for name, f in own.items():
            site, (low, high) = net.sites[name], bounds(net.sites[name])
            width = round(min(max(common * f, slowest), FASTEST) * site.awake)
            counts[name] = int(min(max(width, low), high)) - site.awake
        return counts

    counts = changes(FASTEST, slowest=1.0)
    if not priced.has_room(net, counts):
        low, high = 0.0, FASTEST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if priced.has_room(net, changes(middle)) else (low, middle)
        counts = changes(low)
    ratios = [1 + n / net.sites[name].awake for name, n in counts.items()]
    if priced.has_room(net, {}) and not any(f >= UNEVEN or f <= 1 / UNEVEN for f in ratios):
        return Moves()
    leaving = {
        name: (*v.worthless, *(u for u in v.ranked if u not in v.worthless))[: max(len(v.worthless), -counts[name])]
        for name, v in found.items()
    }
    added = {name: n + len(leaving[name]) for name, n in counts.items()}
    return Moves({name: n for name, n in added.items() if n > 0}, {name: us for name, us in leaving.items() if us})


def _by_itself(v: Verdict) -> float:
    """Return the factor by which a site grows by what its own units are worth."""
    return min(FASTEST, (max(0.0, v.worth) / v.price) ** (1 / POWER)) if v.price else FASTEST


def _beyond_chance(v: Verdict, r: float) -> float:
    """Return by which factor a site should be wider than the common one, as far as that is beyond chance.

    Args:
        v: What its units are worth.
        r: What the units of all sites are worth over what they cost.
    """
    usual, margin = v.price * r, ERRORS * v.error
    if not 0 < usual < math.inf:
        return 1.0
    worth = max(usual, v.worth - margin) if v.worth > usual else min(usual, v.worth + margin)
    return (max(worth, 0.0) / usual) ** (1 / POWER)
