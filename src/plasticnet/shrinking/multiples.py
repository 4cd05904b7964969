"""Brings the widths of a network whose units were closed to multiples of a number, within a budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plasticnet.gates.site import INITIAL_LOGIT, set_logits
from plasticnet.net import PlasticNet
from plasticnet.surgery.survivors import units_of_multiple
from plasticnet.units import BlockUnits


def close_to_multiples(
    net: PlasticNet, worth: Mapping[str, Tensor], multiple_of: int, targets: Mapping[str, float]
) -> None:
    """Close units, and open others again, so that the open units of every site make a multiple.

    Every site first loses its least useful open units down to the next multiple, unless none would stay. What the
    budget then leaves unused goes to the sites that have lost most by it: each goes up to the next multiple if that
    fits.

    Args:
        net: The network, in which units are open or closed at k = infinity. Sites of blocks have no widths, and stay.
        worth: For every site a score for each unit, shape (units,).
        multiple_of: What widths become multiples of.
        targets: The most that the network may cost, by the names of costs.
    """
    lost = dict[str, float]()  # by which part of a multiple
    for name, site in net.sites.items():
        count, step = int(site.open.sum()), units_of_multiple(site.units, multiple_of)
        if not isinstance(site.units, BlockUnits) and count >= step and count % step:
            lost[name] = count % step / step
            set_logits(site, _ranked(worth[name], site.open)[count - count % step : count], -INITIAL_LOGIT)
    for name in sorted(lost, key=lambda name: -lost[name]):
        site, closed = net.sites[name], ~net.sites[name].open & ~net.sites[name].asleep
        step = units_of_multiple(site.units, multiple_of)
        if int(closed.sum()) < step:
            continue
        more = _ranked(worth[name], closed)[:step]
        set_logits(site, more, INITIAL_LOGIT)
        if any(_cost(net, cost) > target for cost, target in targets.items()):
            set_logits(site, more, -INITIAL_LOGIT)


def _ranked(worth: Tensor, among: Tensor) -> Tensor:
    """Return the places of the units, the best of some of them first, shape (units,)."""
    return worth.to(among.device).masked_fill(~among, -torch.inf).argsort(descending=True)


def _cost(net: PlasticNet, cost: str) -> float:
    """Return what the network costs when it is cut to its open units."""
    gates = [*net.sites.values(), *net.weights.values()]
    return float(net.cost.expected(torch.cat([g.open.flatten() for g in gates]).to(net.cost.awake.dtype), cost))
