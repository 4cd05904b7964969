"""What presses on the gates during a schedule: nothing, or a price that stays.

The multipliers of a budget, which move, are in `controller.py`. A schedule treats all of them alike, by what `Force`
has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plasticnet.budgets.budget import present
from plasticnet.errors import PlasticError
from plasticnet.growing.rule import GrowthRule
from plasticnet.learning.guard import guarded
from plasticnet.learning.pressure import Pressure, priced
from plasticnet.net import PlasticNet


class Force:
    """Presses on the gates during a schedule; this one does not press at all, and is there for what others inherit.

    Attributes:
        kind: The argument of a `Schedule` that the force was made from, which also names its state in a state dict.
        loss: By how much the validation loss may rise, or None where that is not limited.
        within: Whether the last validation loss kept to its limit.
        targets: The most that the network may cost when it is hardened, by the names of costs.
        widths: The largest width that each site has had, where there are targets.
        good: The logits to which the gates return when the loss exceeds its limit, by the name of the gates.
        steps: How often the penalty was asked for in the epoch that is running.
        per_epoch: How often it was asked for in the epoch before.
    """

    kind: str | None = None
    loss: float | None = None
    relative = False  # as `Priced` has it

    def __init__(self) -> None:
        self.targets: dict[str, float] = {}
        self.widths: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """Begin anew, as for another round."""
        self.within = True
        self.good: dict[str, Tensor] = {}
        self.steps, self.per_epoch = 0, 0

    def ends_growth(self, net: PlasticNet, late: bool) -> bool:
        """Return whether growth is to stop, also because half of the plastic epochs are over (``late``)."""
        return False

    def notice(self, net: PlasticNet) -> None:
        """Note the widths of the network before it is cut."""

    def remember(self, net: PlasticNet) -> None:
        """Note the present logits, if the gates may have to return to them."""

    def unit_prices(self, net: PlasticNet) -> dict[str, float]:
        """Return what one unit of each site costs in addition to all others, in units of the loss."""
        return dict.fromkeys(net.sites, 0.0)

    def has_room(self, net: PlasticNet, counts: Mapping[str, int]) -> bool:
        """Return whether the network may get so many units more, by the name of the site."""
        return True

    def penalty(self, net: PlasticNet, growth: GrowthRule | None, epoch: int, end: int) -> Tensor:
        """Return what is added to the loss of a step in a plastic stage, a scalar, which is 0 until growth has stopped.

        Args:
            net: The network.
            growth: How the network grows, or None.
            epoch: The epoch that is running, counted from 0.
            end: The first epoch after the plastic ones.
        """
        return net.like.new_zeros(())

    def step(self, val_loss: float, plastic: bool, passed: int, epochs: int) -> None:
        """End an epoch.

        Args:
            val_loss: The validation loss after this epoch; NaN where none is needed.
            plastic: Whether the epoch was a plastic one.
            passed: How many of the plastic epochs are over.
            epochs: How many plastic epochs there are.
        """
        self.steps, self.per_epoch = 0, self.steps

    def metrics(self) -> dict[str, float]:
        """Return the numbers that say how hard it presses, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned, or raise `PlasticError` and change nothing."""


class Price(Force):
    """A `Pressure` on the gates, which is the same in all plastic epochs.

    Args:
        net: The network.
        pressure: What its cost is worth.

    Raises:
        PlasticError: The cost is the latency, which has not been measured.
    """

    kind = "pressure"

    def __init__(self, net: PlasticNet, pressure: Pressure) -> None:
        super().__init__()
        self.prices, self.scale = pressure.prices, pressure.scale
        for cost in self.prices:
            present(net, cost)  # This raises where the cost is not known.

    def penalty(self, net: PlasticNet, growth: GrowthRule | None, epoch: int, end: int) -> Tensor:
        """Return the price of the expected cost, as `PlasticNet.penalty` does.

        While growth goes on it is 0, unless growth does not stop by itself.
        """
        if growth is not None and not growth.stopped and not growth.endless:
            # The gates get a gradient of 0, and not none, because units that are held open later get the same. So
            # the optimizer of the gates counts all steps of the stage.
            return guarded(net, 0 * net.phi().sum())
        return priced(net, self.prices, self.scale)

    def unit_prices(self, net: PlasticNet) -> dict[str, float]:
        """Return what one unit of each site costs in addition to all others, in units of the loss.

        A site's own strength counts (see `PlasticNet.limit`). A logarithm is taken at the present cost.
        """
        whole = {cost: 1.0 if self.scale == "linear" else float(net.cost.full(cost)) for cost in self.prices}
        prices = unit_prices(net, {cost: price / whole[cost] for cost, price in self.prices.items()})
        return {name: site.strength * prices[name] for name, site in net.sites.items()}

    def metrics(self) -> dict[str, float]:
        """Return what one unit of each cost is worth, as "price/COST"."""
        return {f"price/{cost}": price for cost, price in self.prices.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the prices, which may stem from a network that was larger or a latency that was measured, and more."""
        return {
            "prices": dict(self.prices), "scale": self.scale, "steps": self.steps, "per_epoch": self.per_epoch,
        }  # fmt: skip

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned; the prices of the state take the place of this schedule's.

        Raises:
            PlasticError: The state is not that of a pressure on the same costs and scale. Nothing was changed.
        """
        if not isinstance(state, Mapping) or not self._takes(state):
            costs = ", ".join(self.prices)
            raise PlasticError(
                f"the state of the pressure is not one of {costs} on a {self.scale} scale: {state!r}. Give the "
                "Schedule the pn.Pressure that it had when the state was saved"
            )
        self.prices, self.steps, self.per_epoch = dict(state["prices"]), state["steps"], state["per_epoch"]

    def _takes(self, state: Mapping[str, Any]) -> bool:
        """Return whether a state has everything that is kept here, in a form that can be used."""
        prices = state.get("prices")
        return (
            isinstance(prices, Mapping)
            and list(prices) == list(self.prices)
            and all(isinstance(v, int | float) and 0 <= v < float("inf") for v in prices.values())
            and state.get("scale") == self.scale
            and all(type(state.get(name)) is int and state[name] >= 0 for name in ("steps", "per_epoch"))
        )


def unit_prices(net: PlasticNet, prices: Mapping[str, float]) -> dict[str, float]:
    """Return what one unit of each site costs in addition to all others.

    Args:
        net: The network.
        prices: What each cost is multiplied by.
    """
    found = dict.fromkeys(net.sites, 0.0)
    for cost, price in prices.items():
        for name, units in zip(net.sites, net.cost.unit_costs(cost), strict=True):
            found[name] += price * units
    return found
