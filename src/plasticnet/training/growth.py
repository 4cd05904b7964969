"""Growth: which site, when and how many."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
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
    """Grow for as long as the validation loss falls.

    When (NPN, section 4.2: where the validation loss improved on the best so far): an improvement counts
    from a share ``gain`` of the first loss on, judged over periods of ``patience`` epochs; without a
    threshold growth never ends. A period without one grows too, unless ``insist`` is false, for a network
    may be too small to improve; after ``failures`` of them in a row, growth has stopped for good.

    Which, and how many: without ``loss``, every site grows by a share ``rate`` of its units, at least
    one. With ``loss``, a function without arguments that gives the loss of ``net`` on some training
    data, units are added until they have spent a share ``rate`` of the network's cost (one of those of
    `PlasticNet.penalty`; a unit is counted at what it costs beside all candidates), at the sites where
    they promise most for it, none growing by more than twice that share: candidates are added with
    outgoing weights of zero, and judged by the gradient of those (GradMax, arXiv 2201.05125). With
    ``init="gradmax"`` their incoming weights are changed first, so that it is as large as can be; with
    "preserve" they stay random. `PlasticNet.limit` bounds the sites.

    While it grows, all units are held open and unpriced: under pressure, new ones would close before
    they have learned anything. The pressure begins ``grace`` epochs after growth has stopped, and
    takes back what did not pay.
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
    first: float = math.nan
    best: float = math.inf  # of the periods before this one
    here: float = math.inf  # in this period
    waited: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        self.init = self.init or ("gradmax" if self.loss is not None else "random")
        allowed = INITS if self.loss is None else ("gradmax", "preserve")
        if self.init not in allowed:
            given = "without a loss to take the gradient of" if self.loss is None else "with a loss"
            raise PlasticError(f"Growth(init={self.init!r}): {given}, choose one of {', '.join(allowed)}")
        check_names(self.cost, "linear")

    @classmethod
    def paper(cls) -> Growth:
        """The paper's rule (NPN, section 4.2): after each epoch whose validation loss is the best so far, every
        site gets one unit, with random weights and at pi = 1/2, under pressure at once. It does not stop by
        itself."""
        return cls(rate=1e-9, patience=1, gain=0.0, failures=sys.maxsize, grace=0, init="paper", insist=False)

    @property
    def stopped(self) -> bool:
        """Whether growth has stopped, by itself or by `stop`."""
        return self.failed >= self.failures

    def stop(self) -> None:
        """Grow no more."""
        self.failed = self.failures

    def reset(self) -> None:
        """Begin anew, as if nothing had been seen."""
        self.first, self.best, self.here = math.nan, math.inf, math.inf
        self.waited, self.failed = 0, 0

    def hold(self, net: PlasticNet) -> None:
        """Keep every unit open and unpriced for ``grace`` epochs more, unless growth has stopped."""
        if not self.stopped and self.grace:
            for site in net.sites.values():
                site.grace.clamp_(min=self.grace + 1)

    def step(self, net: PlasticNet, val_loss: float, optimizer: Optimizers) -> dict[str, int]:
        """Grow ``net`` if the validation loss says so; returns how many units each site got."""
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
                self.failed = self.failed if counts else self.failures  # no room left
        self.hold(net)
        return counts

    def _grow(self, net: PlasticNet, optimizer: Optimizers) -> dict[str, int]:
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
        """How many units a share ``rate`` is for each site, at least one, within its limits."""
        counts: dict[str, int] = {}
        for name, site in net.sites.items():
            room = site.room if site.units.growable else 0
            n = min(max(math.ceil(rate * len(site)), site.minimum - len(site)), room)
            if n > 0:
                counts[name] = int(n)
        return counts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Raises `PlasticError` when something else is given."""
        if not isinstance(state, Mapping) or any(not isinstance(state.get(name), int | float) for name in _STATE):
            raise PlasticError(f"the state of growth has the numbers {', '.join(_STATE)}; this is {state!r}")
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("first", "best", "here", "waited", "failed")


def narrow(net: PlasticNet, units: int) -> None:
    """Cut every site of an untrained network that can grow to its first ``units`` units and initialise
    its layers for that width, to grow from there.

    Raises `PlasticError` when ``units`` is less than 1.
    """
    if units < 1:
        raise PlasticError(f"cannot start from {units} units a site; at least 1 is needed")
    wide = {n: s for n, s in net.sites.items() if len(s) > units and s.units.growable}  # others would stay narrow
    channels = {n: list(range(units)) for n, s in wide.items() if not _selects(s)}
    net.resize(channels)
    features = {n: _spread(len(s), units) for n, s in net.sites.items() if len(s) > units and _selects(s)}
    net.resize(features)
    for module in net.model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _selects(site: Any) -> bool:
    return isinstance(site.units, InputUnits)


def _spread(n: int, units: int) -> list[int]:
    return sorted(torch.randperm(n)[:units].tolist())
