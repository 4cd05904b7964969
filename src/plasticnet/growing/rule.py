"""What all rules of growth share, so that a schedule treats them alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from plasticnet.errors import PlasticError
from plasticnet.growing.depth import growing_sites
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import Optimizers


class Priced(Protocol):
    """What presses on the gates, as far as growth asks it."""

    relative: bool  # whether prices are only known up to a factor, as those of a budget on costs

    def unit_prices(self, net: PlasticNet) -> Mapping[str, float]:
        """Return what one unit of each site costs in addition to all others, in units of the loss."""
        ...

    def has_room(self, net: PlasticNet, counts: Mapping[str, int]) -> bool:
        """Return whether the network may get so many units more."""
        ...


# Growth ends in any case when this share of the plastic epochs is over.
LATE = 0.5


@dataclass(frozen=True)
class Turnover:
    """What a rule has changed.

    Attributes:
        cut: How many units have left, for each site that lost some.
        grown: How many units have come, for each site that got some.
    """

    cut: Mapping[str, int] = field(default_factory=dict)
    grown: Mapping[str, int] = field(default_factory=dict)


class GrowthRule:
    """Decides when a network grows, at which sites, and by how many units.

    Attributes:
        endless: Whether the rule never stops by itself, so that a pressure does not wait for its end.
        needs_loss: Whether it judges by validation losses.
        needs_price: Whether it judges by the price of a pressure or a budget.
        deeper: Whether it opens blocks that sleep.
        priced: What presses on the gates, once a schedule has taken the rule.
    """

    endless = False
    needs_loss = False
    needs_price = False
    deeper = False

    def __init__(self) -> None:
        self.stopped = False
        self.priced: Priced
        self._taken = False

    def take(self, net: PlasticNet, priced: Priced) -> None:
        """Note that a schedule uses this rule.

        Args:
            net: The network.
            priced: What presses on its gates.

        Raises:
            PlasticError: Another schedule does already, or no site of the network can grow.
        """
        if self._taken:
            raise PlasticError(
                "this growth belongs to another schedule, and goes on from what it knows of that; make a new one"
            )
        if not growing_sites(net, self.deeper):
            raise PlasticError("no site of this network can grow: net.sites and net.frozen say why; leave growth= out")
        self._taken, self.priced = True, priced

    def stop(self) -> None:
        """Stop growth for good."""
        self.stopped = True

    def reset(self) -> None:
        """Begin anew, as for another round."""
        self.stopped = False

    def hold(self, net: PlasticNet) -> None:
        """Prepare a plastic epoch: hold units open, and ask for measurements, where the rule needs them."""

    def attend(self, net: PlasticNet) -> None:
        """Ask the network again for measurements that a checkpoint has interrupted."""

    def check(self, net: PlasticNet, penalties: int) -> None:
        """Raise `PlasticError` where the epoch that ends has not given the rule what it needs.

        Args:
            net: The network.
            penalties: How often the epoch has asked for the penalty of the schedule.
        """

    def step(self, net: PlasticNet, optimizer: Optimizers, *, val_loss: float, over: float) -> Turnover:
        """End a plastic epoch, and grow the network if the rule says so.

        Args:
            net: The network.
            optimizer: The optimizer, or all of those, that hold the parameters.
            val_loss: The validation loss after the epoch, or NaN.
            over: The share of the plastic epochs that are over.

        Returns:
            How many units have left, and how many have come.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, as plain numbers."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or raise `PlasticError` and change nothing."""
        raise NotImplementedError
