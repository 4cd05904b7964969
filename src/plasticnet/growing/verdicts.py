"""What the units of a network are worth, from by how much they are missed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from plasticnet.growing.depth import is_depth
from plasticnet.growing.rule import Priced
from plasticnet.learning.missed import Missed
from plasticnet.net import PlasticNet

# Units are missed where their worth is more than so many of its standard errors.
ERRORS = 2.0
# Units that are worth less than this share of their price would not pay in a network of half the width either.
WORTHLESS = 1 / 16


@dataclass(frozen=True)
class Verdict:
    """What the units of a site are worth that were judged.

    Attributes:
        worth: By how much the loss rises when one of them is closed, on average.
        price: What one of them costs.
        samples: Over how many samples or batches the worth was measured. Where the units have several turns, as blocks
            have, this is the number for one turn, so that they count like others.
        error: The standard error of the worth.
        ranked: The places of these units in the site, in the order in which they should leave: by the most that each
            may be worth, two standard errors above what was measured. By the measured worth alone, those would leave
            first that were unlucky. Those of which nothing depends, such as constant inputs, would stay.
        worthless: The places of those that are worth next to nothing for their price, beyond what chance explains.
        depth: Whether the units are whole blocks. These are not ranked, because they do not leave.
    """

    worth: float
    price: float
    samples: float
    error: float
    ranked: tuple[int, ...] = ()
    worthless: tuple[int, ...] = ()
    depth: bool = False


def verdicts(net: PlasticNet, missed: Missed, priced: Priced) -> dict[str, Verdict]:
    """Return what the units of each site are worth, for the sites of which some were measured.

    Args:
        net: The network.
        missed: By how much its units are missed.
        priced: What presses on the gates. Where prices are only known up to a factor, only units that are not missed
            at all are worthless.
    """
    rises, counts, squares = net.ranks.average(torch.stack([missed.rises, missed.counts, missed.squares])).cpu()
    units, prices, start = missed.units.cpu(), priced.unit_prices(net), 0
    found = {}
    for name, site in net.sites.items():
        own = (units >= start) & (units < start + len(site)) & (counts > 0)
        places, n, price = units[own] - start, counts[own], prices[name]
        start += len(site)
        if len(places):
            worth = rises[own] / n
            most = worth + ERRORS * (squares[own] / net.ranks.count).sqrt() / n
            samples = float(n.sum())
            verdict = Verdict(
                float(rises[own].sum()) / samples,
                price,
                samples,
                math.sqrt(float(squares[own].sum()) / net.ranks.count) / samples,
                tuple(places[most.argsort(stable=True)].tolist()),
                tuple(places[most <= 0 if priced.relative else most < WORTHLESS * price].tolist()),
            )
            if is_depth(site):
                once = samples * len(set(places.tolist())) / len(places)
                verdict = replace(verdict, samples=once, ranked=(), worthless=(), depth=True)
            found[name] = verdict
    return found


def missed_at_all(found: Mapping[str, Verdict]) -> bool:
    """Return whether the units that were judged are missed by more than chance explains."""
    worth = sum(v.worth * v.samples for v in found.values())
    error = math.sqrt(sum((v.error * v.samples) ** 2 for v in found.values()))
    return worth > ERRORS * error


def beyond_chance(found: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Return the verdicts on units if these are missed beyond chance, and those on blocks if these are."""
    kinds = ({name: v for name, v in found.items() if v.depth is depth} for depth in (False, True))
    return {name: v for kind in kinds if missed_at_all(kind) for name, v in kind.items()}


def worth_over_price(found: Mapping[str, Verdict]) -> float:
    """Return what all units that were judged are worth over what they cost; infinity where they cost nothing.

    Blocks do not count beside units: what one is worth and costs is that of the units within it, once more.
    """
    found = {name: v for name, v in found.items() if not v.depth} or found
    worth = sum(v.worth * v.samples for v in found.values())
    price = sum(v.price * v.samples for v in found.values())
    return max(0.0, worth / price) if price else math.inf
