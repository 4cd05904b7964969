"""Chooses what presses on the gates during a schedule, from what the user has given to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from plasticnet.budgets.budget import Budget
from plasticnet.budgets.projection import decide
from plasticnet.errors import PlasticError
from plasticnet.growing.rule import GrowthRule
from plasticnet.learning.pressure import Pressure
from plasticnet.net import PlasticNet
from plasticnet.training.controller import Controller
from plasticnet.training.force import Force, Price
from plasticnet.training.stages import Stage


def pressing(
    net: PlasticNet,
    stages: Sequence[Stage],
    budget: Budget | None,
    pressure: Pressure | None,
    growth: GrowthRule | None,
) -> Force:
    """Return what presses on the gates of a network.

    Args:
        net: The network at the beginning of the schedule.
        stages: The stages of the schedule.
        budget: What the network may cost or lose in the end, or None.
        pressure: What its cost is worth, or None.
        growth: How it grows, or None.

    Raises:
        PlasticError: Both are given, or neither where growth needs a price; one is of another type; there is no
            plastic stage to grow in; the smallest network is not within the budget; no stage hardens the network to
            it; or a latency was not measured.
    """
    if growth is not None and not isinstance(growth, GrowthRule):
        raise PlasticError(f"growth={growth!r}: write pn.Growth(), or pn.Growth.paper() for the rule of the paper")
    if growth is not None and growth.needs_price and pressure is None and budget is None:
        raise PlasticError(
            "Schedule(growth=pn.Growth()): growth stops where new units are not worth their price, and nothing sets a "
            "price. Give pressure=pn.Pressure(1e-5, cost='parameters'), say, or budget=pn.Budget(params=...)"
        )
    if growth is not None and not any(s.plastic for s in stages):
        raise PlasticError(
            "Schedule(growth=...) grows nothing without a plastic stage, one at finite k: give stages such as "
            "[pn.Stage(2), pn.Stage(20, k=7.0), pn.Stage(5)]"
        )
    if budget is not None and pressure is not None:
        raise PlasticError(
            "Schedule(budget=..., pressure=...): a budget finds the strength of its pressure by itself. Leave out "
            "pressure= to meet the budget, or budget= to press with the strength of pn.Pressure"
        )
    if pressure is not None:
        if not isinstance(pressure, Pressure):
            raise PlasticError(f"pressure={pressure!r}: write pn.Pressure(0.1, cost='parameters', scale='log'), say")
        return Price(net, pressure)
    if budget is None:
        return Force()
    if not isinstance(budget, Budget):
        raise PlasticError(f"budget={budget!r}: write pn.Budget(macs=0.3), say")
    if not any(a.plastic and math.isinf(b.k) for a, b in pairwise(stages)):
        raise PlasticError(
            "a budget is met when the network hardens: let a stage at finite k be followed by one at k = infinity"
        )
    controller = Controller(net, budget)
    if controller.targets:
        decide(net, controller.targets)
    return controller
