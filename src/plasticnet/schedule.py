"""Schedule: k over the stages, units that hibernate are cut, new ones wake."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from plasticnet import distributed
from plasticnet.compact import check_multiple
from plasticnet.errors import PlasticError
from plasticnet.gates import INITIAL_LOGIT, OPEN_LOGIT
from plasticnet.growth import Growth
from plasticnet.net import PlasticNet
from plasticnet.optimizers import check_optimizers, listed
from plasticnet.units import BlockUnits

# A cut takes a small part of a training step, but what was compiled or wrapped must be built anew.
PAYS = 0.02  # the share of the MACs or of the parameters from which on it is worth it


@dataclass(frozen=True)
class Stage:
    """``epochs`` epochs at one ``k`` (0: dropout, finite: plastic, infinity: ordinary training)."""

    epochs: int
    k: float = math.inf

    def __post_init__(self) -> None:
        numbers = type(self.epochs) is int and isinstance(self.k, Real) and not isinstance(self.k, bool)
        if not numbers or self.epochs < 0 or not self.k >= 0:
            raise PlasticError(f"Stage(epochs={self.epochs}, k={self.k}): whole epochs and a number, both 0 or more")


@dataclass(frozen=True)
class Change:
    """What `Schedule.step` did: units cut and grown per site, and k for the next epoch."""

    cut: Mapping[str, int] = field(default_factory=dict)
    grown: Mapping[str, int] = field(default_factory=dict)
    k: float = math.inf


class Schedule:
    """Moves a network through its stages; call `step` at the end of every epoch.

    On entering a plastic stage from ordinary training the open gates start at pi = 0.95. During it,
    units with pi below ``hibernate`` are cut at the end of an epoch, once together they are 2 % of the
    MACs or of the parameters, and ``growth`` adds units. On leaving it, the network hardens: units with
    pi < 1/2 are cut. ``multiple_of`` keeps widths at multiples; see `PlasticNet.prune`.

    ``on_resize(net)`` is called at the end of a `step` in which sizes changed. Whatever holds on to the
    network as it was belongs there: wrapping it in `DistributedDataParallel`, compiling it, copying it
    for an average of its weights. On several ranks all of them must call `step`, each with its own
    ``val_loss``; the mean decides.
    """

    def __init__(
        self,
        net: PlasticNet,
        optimizer: Optimizer | Sequence[Optimizer],
        stages: Sequence[Stage],
        *,
        hibernate: float = 0.01,
        growth: Growth | None = None,
        multiple_of: int = 1,
        on_resize: Callable[[PlasticNet], object] | None = None,
    ) -> None:
        """Raises `PlasticError` when there are no epochs, or the optimizers lack a parameter of the network
        or cannot follow a change of size."""
        if not stages or not sum(s.epochs for s in stages):
            raise PlasticError("a schedule needs at least one stage with epochs")
        self.net = net
        self.optimizers = listed(optimizer)
        check_optimizers(self.optimizers, dict(net.named_parameters()))
        if not 0 <= hibernate <= 1:
            raise PlasticError(f"hibernate={hibernate}: the probability below which a unit is cut, from 0 to 1")
        check_multiple(multiple_of)
        self.stages = [s for s in stages if s.epochs]
        self.hibernate = hibernate
        self.growth = growth
        self.multiple_of = multiple_of
        self.on_resize = on_resize
        self.epoch = 0
        # A network that has been trained or loaded is not changed here; its checkpoint follows, or its gates stay.
        fresh = all(bool((site.phi == INITIAL_LOGIT).all()) for site in net.sites.values())
        before, net.k = net.k, self.stage.k
        if fresh and 0 < self.stage.k < math.inf and before != self.stage.k:
            self._open(self.stage.k)

    @property
    def epochs(self) -> int:
        """The epochs of all stages together."""
        return sum(s.epochs for s in self.stages)

    @property
    def stage(self) -> Stage:
        """The stage of the epoch that is running (the last one, at the end)."""
        end = 0
        for stage in self.stages:
            end += stage.epochs
            if self.epoch < end:
                return stage
        return self.stages[-1]

    def step(self, val_loss: float | None = None) -> Change:
        """End an epoch. ``val_loss`` is the loss on held-out data; growth decides by it.

        Raises `PlasticError` at the end of the schedule, and when growth needs a validation loss and there is
        none, or it is NaN.
        """
        if self.epoch >= self.epochs:
            raise PlasticError(f"the schedule is over: it has {self.epochs} epochs, and all of them were ended")
        before = self.stage
        plastic = 0 < before.k < math.inf
        loss = math.nan
        if plastic and self.growth is not None:
            loss = distributed.mean(self.net, math.nan if val_loss is None else float(val_loss))
            if math.isnan(loss):
                raise PlasticError(f"val_loss={val_loss}: growth needs the validation loss of every plastic epoch")
        check_optimizers(self.optimizers, dict(self.net.named_parameters()))
        self.epoch += 1
        cut: dict[str, int] = {}
        grown: dict[str, int] = {}
        if plastic:
            for site in self.net.sites.values():
                site.grace.sub_(1).clamp_(min=0)
            if self._pays():
                cut = self.net.prune(self.hibernate, self.optimizers, self.multiple_of)
            if self.growth is not None and self.stage is before:
                grown = self.growth.step(self.net, loss, self.optimizers)
        if self.stage is not before:
            for name, n in self._enter(self.stage).items():
                cut[name] = cut.get(name, 0) + n
        elif self.epoch == self.epochs and plastic:
            self._drop_gate_state()
        if self.on_resize is not None and (cut or grown):
            self.on_resize(self.net)
        return Change(cut, grown, self.net.k)

    def _pays(self) -> bool:
        """Whether cutting what hibernates makes the network smaller by a share of `PAYS`."""
        keep = self.net._survivors(self.hibernate, self.multiple_of)
        if not keep:
            return False
        sites = self.net.sites.items()
        kept = [np.isin(np.arange(len(site)), keep.get(name, range(len(site)))) for name, site in sites]
        then = torch.from_numpy(np.concatenate(kept)).to(next(iter(self.net.parameters())).device, torch.float32)
        cost, now = self.net._cost.expected, torch.ones_like(then)
        return any(float(cost(then, c)) <= (1 - PAYS) * float(cost(now, c)) for c in ("macs", "parameters"))

    def _enter(self, stage: Stage) -> dict[str, int]:
        """Set k; harden or open the gates; forget the gates' moments, which belong to another k."""
        net, before = self.net, self.net.k
        cut: dict[str, int] = {}
        if stage.k == before:
            return cut
        net.k = stage.k
        if math.isinf(stage.k):
            cut = self._harden()
        elif stage.k and (before == 0 or math.isinf(before)):
            self._open(stage.k)
        self._drop_gate_state()
        return cut

    def _harden(self) -> dict[str, int]:
        for site in self.net.sites.values():
            site.grace.zero_()
        cut = self.net.prune(0.5, self.optimizers, self.multiple_of)
        with torch.no_grad():  # the units that a site keeps as its minimum are there to be used
            for site in self.net.sites.values():
                if int(site.open.sum()) < site.minimum and not isinstance(site.units, BlockUnits):
                    site.phi[site.likely(site.minimum)] = INITIAL_LOGIT
        return cut

    def _open(self, k: float) -> None:
        with torch.no_grad():
            for site in self.net.sites.values():
                site.phi.copy_(torch.where(site.open, OPEN_LOGIT / k, site.phi))
        if self.growth is not None:
            self.growth.hold(self.net)

    def _drop_gate_state(self) -> None:
        logits = {site.phi for site in self.net.sites.values()}
        for optimizer in self.optimizers:
            for phi in logits & optimizer.state.keys():
                del optimizer.state[phi]

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the state of growth; the network has its own."""
        return {"epoch": self.epoch, "growth": None if self.growth is None else self.growth.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Load the network's state too: it holds k and the sizes.

        Raises `PlasticError` when the state has an epoch that this schedule does not, or growth differs.
        """
        epoch, growth = state.get("epoch"), state.get("growth")
        if type(epoch) is not int or not 0 <= epoch <= self.epochs:
            raise PlasticError(f"the state is at epoch {epoch!r}, but this schedule has {self.epochs}")
        if (growth is None) != (self.growth is None):
            raise PlasticError("the state was saved with growth and this schedule has none, or the other way round")
        if self.growth is not None and growth is not None:
            self.growth.load_state_dict(growth)
        self.epoch = epoch
        self.net.k = self.stage.k
