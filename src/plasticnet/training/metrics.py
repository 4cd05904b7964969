"""Gathers the numbers that a schedule knows at the end of an epoch, for whatever logs them."""

from __future__ import annotations

from plasticnet.growing.rule import GrowthRule
from plasticnet.net import PlasticNet
from plasticnet.training.force import Force
from plasticnet.training.stages import Change


def metrics(net: PlasticNet, growth: GrowthRule | None, force: Force, change: Change) -> dict[str, float]:
    """Return the numbers of an epoch that has ended, by names that loggers group at the slash.

    Args:
        net: The network, after it was cut and grown.
        growth: How the network grows, or None.
        force: What presses on its gates.
        change: What was changed at the end of the epoch.

    Returns:
        Plain numbers. "k" is that of the next epoch, infinity included. "undecided" is `Change.transition`. "units",
        "parameters" and "macs" count what is open, and "units/SITE" the open units of a site. "cut" and "grown" are
        how many units have left and come. With growth there is "growing", 1 until it has stopped. A pressure has
        "price/COST", and a budget "multiplier/COST" and "target/COST".
    """
    size = net.summary()
    numbers: dict[str, float] = {
        "k": change.k,
        "undecided": change.transition,
        "units": sum(site.open for site in size.sites),
        "parameters": size.open_parameters,
        "macs": size.open_macs,
        "cut": sum(change.cut.values()),
        "grown": sum(change.grown.values()),
    }
    if growth is not None:
        numbers["growing"] = float(not growth.stopped)
    return numbers | force.metrics() | {f"units/{site.name}": site.open for site in size.sites}
