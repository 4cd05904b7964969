"""Growth: decides when a network grows, at which sites, and by how many units."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from plasticnet.cost.names import check_names
from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.surgery.candidates import grow_by_gradient
from plasticnet.surgery.optimizers import Optimizers
from plasticnet.surgery.rewrite import INITS
from plasticnet.tools.inputs import Loss
from plasticnet.units import InputUnits


@dataclass
class Growth:
    """A rule by which a network grows for as long as its validation loss falls.

    `Schedule` applies it at the end of every plastic epoch.

    When: the validation loss is judged over periods of ``patience`` epochs. A period is an improvement if its lowest
    loss is below that of all periods before it by at least a share ``gain`` of the very first loss. Without such a
    threshold growth would never end, because training alone lowers the loss a little. The network grows after every
    improvement. It also grows after a period without one, unless ``insist`` is false, because it may be too small to
    improve. Growth stops for good after ``failures`` periods in a row without an improvement, or when no site has room
    for more units. `paper` has the original rule (NPN, section 4.2).

    Where, without ``loss``: every site grows by a share ``rate`` of its units, and by at least one unit.

    Where, with ``loss``: candidates are added, with outgoing weights of zero, and judged by the gradient of these
    weights (GradMax, Evci et al., arXiv 2201.05125, section 3). Those that promise most for their cost stay, until they
    have spent a share ``rate`` of the cost of the network. The cost of a unit is what it adds to the network with all
    candidates. No site grows by more than twice that share of its units.

    In all cases `PlasticNet.limit` bounds the sites. While the network grows, all units are held open and unpriced:
    under pressure, new units would close before they have learned anything. The pressure begins ``grace`` epochs after
    growth has stopped, and removes the units that did not pay.

    Args:
        loss: A function without arguments that runs the network on some training data and returns its losses, shape
            (batch,), or their mean.
        rate: The share by which the network grows each time.
        patience: The number of epochs in a period.
        gain: The improvement that counts, as a share of the first validation loss.
        failures: The number of periods in a row without an improvement after which growth stops.
        grace: For how many epochs units are held open after growth has stopped; with 0 they are not held open at all.
        init: How new units begin. With a loss, "gradmax" (the default) first changes their incoming weights so that the
            gradient becomes large, and "preserve" leaves them random. Without a loss, it is one of the values of
            `PlasticNet.resize`, by default "random". An empty string stands for the default.
        cost: What the units are priced by when there is a loss: "units", "parameters", "macs" or "latency".
        insist: Whether the network also grows after a period without an improvement.

    Attributes:
        first: The first validation loss, or NaN before there is one.
        best: The lowest validation loss of all periods that are over.
        here: The lowest validation loss of the present period.
        waited: How many epochs of the present period are over.
        failed: How many periods in a row were no improvement.

    Raises:
        PlasticError: The value of ``init`` is not possible with, or without, a loss; or the cost is unknown.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3))
        >>> net = pn.PlasticNet(model, (torch.randn(8, 4),))
        >>> optimizer = torch.optim.Adam(net.param_groups(lr=0.01))
        >>> stages = [pn.Stage(5, k=7.0), pn.Stage(5)]
        >>> schedule = pn.Schedule(net, optimizer, stages, growth=pn.Growth(rate=0.5, patience=1))
        >>> schedule.step(val_loss=1.0).grown
        {'0': 1}
        >>> model[0]
        Linear(in_features=4, out_features=3, bias=True)
    """

    loss: Loss | None = None
    rate: float = 0.5
    patience: int = 3
    gain: float = 0.03
    failures: int = 4
    grace: int = 2
    init: str = ""
    cost: str = "macs"
    insist: bool = True
    first: float = field(default=math.nan, init=False)
    best: float = field(default=math.inf, init=False)
    here: float = field(default=math.inf, init=False)
    waited: int = field(default=0, init=False)
    failed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.init = self.init or ("gradmax" if self.loss is not None else "random")
        allowed = INITS if self.loss is None else ("gradmax", "preserve")
        if self.init not in allowed:
            given = "without a loss to take the gradient of" if self.loss is None else "with a loss"
            raise PlasticError(f"Growth(init={self.init!r}): {given}, choose one of {', '.join(allowed)}")
        check_names(self.cost, "linear")

    @classmethod
    def paper(cls) -> Growth:
        """Return the rule of the paper (NPN, section 4.2).

        After each epoch whose validation loss is the best so far, every site gets one unit, with random weights and a
        probability of 1/2. The unit is under pressure at once. This rule does not stop by itself.
        """
        return cls(rate=1e-9, patience=1, gain=0.0, failures=sys.maxsize, grace=0, init="paper", insist=False)

    @property
    def stopped(self) -> bool:
        """Whether growth has stopped, by itself or by `stop`."""
        return self.failed >= self.failures

    @property
    def endless(self) -> bool:
        """Whether growth goes on until `stop`, as the rule of the paper does."""
        return self.failures == sys.maxsize

    def stop(self) -> None:
        """Stop growth for good."""
        self.failed = self.failures

    def reset(self) -> None:
        """Begin anew, as if no validation loss had been seen."""
        self.first, self.best, self.here = math.nan, math.inf, math.inf
        self.waited, self.failed = 0, 0

    def hold(self, net: PlasticNet) -> None:
        """Keep every unit open and unpriced for ``grace`` epochs more, unless growth has stopped."""
        if not self.stopped and self.grace:
            for site in net.sites.values():
                site.grace.clamp_(min=self.grace + 1)

    def step(self, net: PlasticNet, val_loss: float, optimizer: Optimizers) -> dict[str, int]:
        """Note the validation loss of an epoch, and grow the network if the loss says so.

        Args:
            net: The network.
            val_loss: The validation loss after the epoch.
            optimizer: The optimizer, or all of those, that hold the parameters.

        Returns:
            How many units were added, for each site that got some.
        """
        counts: dict[str, int] = {}
        if self.stopped:
            return counts
        self.first = val_loss if math.isnan(self.first) else self.first
        self.here = min(self.here, val_loss)
        self.waited += 1
        if self.waited >= self.patience:
            paid = self.here < self.best and self.best - self.here >= self.gain * abs(self.first)
            self.failed = 0 if paid else self.failed + 1
            self.best, self.here, self.waited = min(self.best, self.here), math.inf, 0
            if not self.stopped and (paid or self.insist):
                counts = self._grow(net, optimizer)
                self.failed = self.failed if counts else self.failures  # No site has room left.
        self.hold(net)
        return counts

    def _grow(self, net: PlasticNet, optimizer: Optimizers) -> dict[str, int]:
        """Grow the network once, and return how many units each site got."""
        before = {name: len(site) for name, site in net.sites.items()}
        if self.loss is None:
            net.grow(self.counts(net, self.rate), optimizer, init=self.init)
        else:
            price = float(net.cost.expected(torch.ones_like(torch.cat([s.phi for s in net.sites.values()])), self.cost))
            grow_by_gradient(
                net, self.counts(net, 2 * self.rate), self.loss, optimizer, budget=self.rate * price, cost=self.cost,
                ascend=self.init == "gradmax",
            )  # fmt: skip
        return {name: len(s) - before[name] for name, s in net.sites.items() if len(s) > before[name]}

    def counts(self, net: PlasticNet, rate: float) -> dict[str, int]:
        """Return how many units each site gets when it grows by a share ``rate``.

        A site gets at least one unit, or as many as it lacks to its minimum, but never more than it has room for. Sites
        that get none are left out.
        """
        counts: dict[str, int] = {}
        for name, site in net.sites.items():
            room = site.room if site.units.growable else 0
            n = min(max(math.ceil(rate * len(site)), site.minimum - len(site)), room)
            if n > 0:
                counts[name] = int(n)
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, as numbers."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            PlasticError: The state is not a mapping with these numbers. Nothing was changed.
        """
        if not isinstance(state, Mapping) or any(not isinstance(state.get(name), int | float) for name in _STATE):
            raise PlasticError(f"the state of growth has the numbers {', '.join(_STATE)}; this is {state!r}")
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("first", "best", "here", "waited", "failed")


def narrow(net: PlasticNet, units: int) -> None:
    """Make an untrained network narrow, so that it can grow from there.

    Every site that can grow and has more than ``units`` units is cut to its first ``units`` ones; an input site keeps
    ``units`` features at random. Then all modules with a method ``reset_parameters`` initialise themselves for the new
    widths, which overwrites their weights.

    Args:
        net: The network. Build its optimizers afterwards.
        units: The number of units that sites keep, 1 or more.

    Raises:
        PlasticError: The number of units is less than 1. Nothing was changed.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> net = pn.PlasticNet(model, (torch.randn(8, 4),))
        >>> pn.narrow(net, 2)
        >>> model[0]
        Linear(in_features=4, out_features=2, bias=True)
    """
    if units < 1:
        raise PlasticError(f"cannot start from {units} units a site; at least 1 is needed")
    # Sites that cannot grow would stay narrow for good.
    wide = {n: s for n, s in net.sites.items() if len(s) > units and s.units.growable}
    channels = {n: list(range(units)) for n, s in wide.items() if not _selects(s)}
    net.resize(channels)
    features = {n: _spread(len(s), units) for n, s in net.sites.items() if len(s) > units and _selects(s)}
    net.resize(features)
    for module in net.model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _selects(site: Any) -> bool:
    """Return whether the units of a site are features of a layer's input."""
    return isinstance(site.units, InputUnits)


def _spread(n: int, units: int) -> list[int]:
    """Return ``units`` of the first ``n`` numbers at random, in increasing order."""
    return sorted(torch.randperm(n)[:units].tolist())
