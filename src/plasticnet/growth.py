"""Growth: which site, when and how many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from plasticnet.errors import PlasticError
from plasticnet.units import InputUnits

if TYPE_CHECKING:
    from plasticnet.net import Optimizers, PlasticNet


@dataclass
class Growth:
    """Grow for as long as the validation loss falls.

    The paper's rule (NPN, section 4.2): where the validation loss improved on the best so far, units
    wake. Here it is judged over periods of ``patience`` epochs, and an improvement counts from a share
    ``gain`` of the first loss on: without a threshold growth never ends. Every period adds a share
    ``rate`` of its units to every site (at least one, up to ``maximum`` by site name; features of new
    channels come with them). After ``failures`` periods in a row without improvement growth has
    stopped for good.

    While it grows, all units are held open and unpriced: under pressure, new ones would close before
    they have learned anything. The pressure begins ``grace`` epochs after growth has stopped, and
    takes back what did not pay.
    """

    rate: float = 0.5
    patience: int = 3
    gain: float = 0.03
    failures: int = 4
    grace: int = 2
    init: str = "random"
    maximum: Mapping[str, int] = field(default_factory=dict)
    first: float = math.nan
    best: float = math.inf  # of the periods before this one
    here: float = math.inf  # in this period
    waited: int = 0
    failed: int = 0

    @property
    def stopped(self) -> bool:
        """Whether growth has stopped by itself."""
        return self.failed >= self.failures

    def hold(self, net: PlasticNet) -> None:
        """Keep every unit open and unpriced for ``grace`` epochs more, unless growth has stopped."""
        if not self.stopped:
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
            paid = self.best - self.here >= self.gain * abs(self.first)
            self.failed = 0 if paid else self.failed + 1
            self.best, self.here, self.waited = min(self.best, self.here), math.inf, 0
            counts = {} if self.stopped else self.counts(net)
            if not counts:  # no room left, or stopped
                self.failed = self.failures
        if counts:
            net.grow(counts, optimizer, init=self.init)
        self.hold(net)
        return counts

    def counts(self, net: PlasticNet) -> dict[str, int]:
        """How many units each site would get now."""
        unknown = [name for name in self.maximum if name not in net.sites]
        if unknown:
            raise PlasticError(f"maximum: there is no site {unknown[0]!r}; the sites are: {', '.join(net.sites)}")
        counts: dict[str, int] = {}
        for name, site in net.sites.items():
            room = self.maximum.get(name, math.inf) - len(site) if site.units.growable else 0
            if isinstance(site.units, InputUnits):
                room = min(room, site.units.full - len(site))
            n = min(math.ceil(self.rate * len(site)), room)
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
