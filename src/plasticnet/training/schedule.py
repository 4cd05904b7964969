"""Schedule: k over the stages, units that hibernate are cut, new ones wake, budgets are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from plasticnet.budgets.budget import Budget, present
from plasticnet.budgets.projection import decide, missing, project
from plasticnet.cost.latency import Latency
from plasticnet.errors import PlasticError
from plasticnet.gates.site import INITIAL_LOGIT, OPEN_LOGIT, probabilities, set_logits, transition
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import check_optimizers, forget, listed
from plasticnet.surgery.survivors import check_finite, check_multiple, survivors, to_keep
from plasticnet.training.controller import Controller
from plasticnet.training.growth import Growth
from plasticnet.training.stages import Change, Stage, check_hardening

# A cut takes a small part of a training step, but what was compiled or wrapped must be built anew.
PAYS = 0.02  # the share of the MACs or of the parameters from which on it is worth it


class Schedule:
    """Moves a network through its stages; call `step` at the end of every epoch.

    On entering a plastic stage from ordinary training the open gates start at pi = 0.95. During it,
    units with pi below ``hibernate`` are cut at the end of an epoch, once together they are 2 % of the
    MACs or of the parameters, and ``growth`` adds units; where fewer units than `Site.minimum` are open, the
    best ones start at pi = 0.95 again. On leaving it, the network hardens: units with
    pi < 1/2 are cut. ``multiple_of`` keeps widths at multiples; see `PlasticNet.prune`.

    With a ``budget`` the loss of every step of training has `penalty` added to it, and on hardening the best
    units stay that fit (see `Budget`): the open units cost at most the target, and no other would fit. Where more were
    cut before than the budget asks for, new ones take their place. Growth then stops when the network costs twice the
    target, or half of the plastic epochs are over.

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
        budget: Budget | None = None,
        multiple_of: int = 1,
        on_resize: Callable[[PlasticNet], object] | None = None,
    ) -> None:
        """Raises `PlasticError` when there are no epochs, the optimizers lack a parameter of the network or cannot
        follow a change of size, the smallest network is not within the budget, or no stage hardens to it."""
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
        self._rounds = [0]  # the places of their first stages; `wake` adds more
        self._first = len(self.stages)  # the stages of the first round
        if growth is not None:
            present(net, growth.cost)  # raises where it is not known
        if budget is not None:
            check_hardening(budget, self.stages)
        self.controller = None if budget is None else Controller(net, budget)
        if self.controller is not None and self.controller.targets:
            decide(net, self.controller.targets)
        # A network that has been trained or loaded is not changed here; its checkpoint follows, or its gates stay.
        fresh = bool((net.phi() == INITIAL_LOGIT).all())
        before, net.k = net.k, self.stage.k
        if fresh and 0 < self.stage.k < math.inf and before != self.stage.k:
            self._open(self.stage.k)

    @property
    def epochs(self) -> int:
        """The epochs of all stages together."""
        return sum(s.epochs for s in self.stages)

    @property
    def rounds(self) -> int:
        """One, and one for each `wake`."""
        return len(self._rounds)

    @property
    def stage(self) -> Stage:
        """The stage of the epoch that is running (the last one, at the end)."""
        return self._place()[0]

    def _place(self) -> tuple[Stage, int]:
        """The stage that is running, and its place in the list."""
        end = 0
        for i, stage in enumerate(self.stages):
            end += stage.epochs
            if self.epoch < end:
                return stage, i
        return self.stages[-1], len(self.stages) - 1

    def plastic_epochs(self) -> tuple[int, int]:
        """The first epoch of the plastic stages around the one that is running, and the first after them."""
        first = last = self._place()[1]
        while first not in self._rounds and self.stages[first - 1].plastic:
            first -= 1
        while last + 1 < len(self.stages) and last + 1 not in self._rounds and self.stages[last + 1].plastic:
            last += 1
        return self._begin(first), self._begin(last + 1)

    def _begin(self, place: int) -> int:
        """The first epoch of a stage."""
        return sum(s.epochs for s in self.stages[:place])

    def penalty(self) -> Tensor:
        """What the budget adds to the loss, a scalar; 0 without one, and outside of plastic stages.

        To be called once for each `PlasticNet.expected_loss`, after it: every call is a step of the multipliers.
        When gradients are accumulated, divide both alike.
        """
        if self.controller is not None:
            self.controller.steps += 1
            if self.stage.plastic and (self.growth is None or self.growth.stopped):
                return self.controller.penalty(self.net, self.epoch, self.plastic_epochs()[1])
        return self.net.like.new_zeros(())

    def step(self, val_loss: float | None = None) -> Change:
        """End an epoch. ``val_loss`` is the loss on held-out data; growth and `Budget(loss=...)` decide by it.

        Raises `PlasticError`, and changes nothing, at the end of the schedule; in a plastic stage when a validation
        loss is needed and there is none, or it is NaN, and when gates are not finite; and when the budget has
        become impossible.
        """
        if self.epoch >= self.epochs:
            raise PlasticError(f"the schedule is over: it has {self.epochs} epochs, and all of them were ended")
        before, place = self._place()
        begin, end = self.plastic_epochs()
        loss = self._loss(val_loss, before)
        check_optimizers(self.optimizers, dict(self.net.named_parameters()))
        if before.plastic:
            check_finite(self.net)
            if self.controller is not None and self.controller.targets and self.epoch + 1 == self._begin(place + 1):
                decide(self.net, self.controller.targets)
        undecided = transition(probabilities(self.net.all_gates(), self.net.k).detach())
        parameters = list(self.net.model.parameters())
        self.epoch += 1
        ends = self._place()[1] != place
        cut: dict[str, int] = {}
        grown: dict[str, int] = {}
        self.net.sampler.gradient = None  # what a checkpoint does not hold must not matter
        if self.controller is not None:
            self.controller.step(loss, before.plastic, self.epoch - begin, max(end - begin, 1))
        if before.plastic:
            for site in self.net.sites.values():
                site.grace.sub_(1).clamp_(min=0)
            self._recover()
            cut = self._cut_hibernating() if self._kept_to_loss() else {}
            if self.growth is not None and not ends:
                if self.controller is not None and (
                    self.controller.outgrown(self.net) or 2 * (self.epoch - begin) >= end - begin
                ):
                    self.growth.stop()
                grown = self.growth.step(self.net, loss, self.optimizers)
        if ends:
            for counts, found in zip((cut, grown), self._enter(self.stage), strict=True):
                counts.update({name: counts.get(name, 0) + n for name, n in found.items()})
        elif self.epoch < self.epochs:
            self.net.k = before.k_of(self.epoch - self._begin(place))
        elif before.plastic:
            self._drop_gate_state()
        rebuilt = any(p is not q for p, q in zip(parameters, self.net.model.parameters(), strict=True))
        if self.on_resize is not None and (cut or grown or rebuilt):
            self.on_resize(self.net)
        return Change(cut, grown, self.net.k, undecided)

    def _loss(self, val_loss: float | None, stage: Stage) -> float:
        """The validation loss over all ranks, NaN where there is none and none is needed."""
        by_loss = self.controller is not None and self.controller.loss is not None
        if not by_loss and not (stage.plastic and self.growth is not None):
            return math.nan
        loss = self.net.ranks.mean(math.nan if val_loss is None else float(val_loss), self.net.like.device)
        if stage.plastic and math.isnan(loss):
            what = "the budget" if by_loss else "growth"
            raise PlasticError(f"val_loss={val_loss}: {what} needs the validation loss of every plastic epoch")
        return loss

    def _kept_to_loss(self) -> bool:
        """Whether the loss is within its budget; if not, the gates go back to where they were when it was, for which
        nothing may be cut."""
        if self.controller is None or self.controller.within:
            if self.controller is not None and not math.isnan(self.controller.begun):
                self.controller.remember(self.net)
            return True
        for g in self.net.all_gates():
            logits = self.controller.good.get(g.name)
            if logits is not None and g.phi.shape == logits.shape:  # else somebody has resized it
                with torch.no_grad():
                    g.phi.copy_(logits)
                forget(self.optimizers, g.phi, torch.ones_like(g.phi, dtype=torch.bool))
        return False

    def _recover(self) -> None:
        """Start the best gates anew where a site has fewer open than it must. The optimizers forget what has pressed
        them down, but not how large their gradients are, or their next step would be of any length."""
        for site in self.net.sites.values():
            if int(site.open.sum()) < min(site.minimum, len(site)):
                units = torch.from_numpy(site.likely(site.minimum)).to(site.phi.device)
                set_logits(site, units, OPEN_LOGIT / self.net.k)
                forget(self.optimizers, site.phi, units)

    def _cut_hibernating(self) -> dict[str, int]:
        if self.controller is not None:
            self.controller.notice(self.net)
        keep = to_keep(self.net, self.hibernate, self.multiple_of)
        if keep and self.controller is not None and self.controller.targets:
            keep = self._with_enough(keep, self.controller.targets)
        if not self._pays(keep):
            return {}
        before = {name: len(site) for name, site in self.net.sites.items()}
        self.net.resize(keep, self.optimizers)
        if self.controller is not None:
            self.controller.remember(self.net)
        return {n: before[n] - len(s) for n, s in self.net.sites.items() if before[n] != len(s)}

    def _with_enough(self, keep: dict[str, list[int]], targets: Mapping[str, float]) -> dict[str, list[int]]:
        """``keep``, and those of the best units that come up to the budget."""
        sites = self.net.sites
        try:
            values = project(self.net, {n: s.phi for n, s in sites.items()}, targets, self.net.open_weights())
        except PlasticError:  # what is held open alone costs more
            return keep
        for name, site in sites.items():
            stays = values[name].copy()
            stays[keep.get(name, slice(None))] = True
            values[name] = np.where(stays, 1.0, 0.4 * site.probability(self.net.k).detach().cpu().numpy())
        return survivors({n: s.units for n, s in sites.items()}, values, 0.5, self.multiple_of)

    def _pays(self, keep: Mapping[str, list[int]]) -> bool:
        """Whether keeping only these units makes the network smaller by a share of `PAYS`."""
        if not keep:
            return False
        sites = self.net.sites.items()
        kept = [np.isin(np.arange(len(site)), keep.get(name, range(len(site)))) for name, site in sites]
        then = torch.from_numpy(np.concatenate(kept)).to(next(iter(self.net.parameters())).device, torch.float32)
        cost, now = self.net.cost.expected, torch.ones_like(then)
        return any(float(cost(then, c)) <= (1 - PAYS) * float(cost(now, c)) for c in ("macs", "parameters"))

    def _enter(self, stage: Stage) -> tuple[dict[str, int], dict[str, int]]:
        """Set k; harden or open the gates; forget the gates' moments, which belong to another k. Returns what was cut,
        and what was added."""
        net, before = self.net, self.net.k
        changed: tuple[dict[str, int], dict[str, int]] = {}, {}
        if stage.k == before:
            return changed
        net.k = stage.k
        if math.isinf(stage.k):
            changed = self._harden()
        elif stage.k and (before == 0 or math.isinf(before)):
            self._open(stage.k)
        self._drop_gate_state()
        return changed

    def _harden(self) -> tuple[dict[str, int], dict[str, int]]:
        sites = self.net.sites
        sizes = {name: len(site) for name, site in sites.items()}
        for site in sites.values():
            site.grace.zero_()
        if self.controller is not None and self.controller.targets:
            targets = self.controller.targets
            units, weights = decide(self.net, targets)
            if counts := missing(self.net, units, targets, self.controller.widths):
                self._add_last(counts)
                units, weights = decide(self.net, targets)
            best = {**units, **weights}
            for g in self.net.all_gates():
                stays = torch.from_numpy(best[g.name]).to(g.phi.device)
                set_logits(g, stays & ~g.open, INITIAL_LOGIT)
                set_logits(g, ~stays & g.open, -INITIAL_LOGIT)
        self.net.prune(0.5, self.optimizers, self.multiple_of)
        for site in sites.values():  # the units that a site keeps as its minimum are there to be used
            if int(site.open.sum()) < site.minimum:
                set_logits(site, torch.from_numpy(site.likely(site.minimum)).to(site.phi.device), INITIAL_LOGIT)
        more = {name: len(site) - sizes[name] for name, site in sites.items()}
        return {name: -n for name, n in more.items() if n < 0}, {name: n for name, n in more.items() if n > 0}

    def _add_last(self, counts: Mapping[str, int]) -> None:
        """Add new units that come after all others."""
        lowest = float(self.net.phi().detach().min()) - 1
        sizes = {name: len(self.net.sites[name]) for name in counts}
        self.net.grow(counts, self.optimizers)
        for name, size in sizes.items():
            set_logits(self.net.sites[name], slice(size, None), lowest)

    def _open(self, k: float) -> None:
        for g in self.net.all_gates():
            set_logits(g, g.open, OPEN_LOGIT / k)
        if self.growth is not None:
            self.growth.hold(self.net)

    def wake(self, stages: Sequence[Stage] | None = None) -> None:
        """Begin another round at the end of the schedule, when data have changed, say: append ``stages``, by
        default those from the first plastic one on. Open gates start at pi = 0.95 again, and growth and the budget's
        multipliers anew; the budget's targets stay.

        Raises `PlasticError` before the end, or when there are no epochs to add.
        """
        if self.epoch < self.epochs:
            raise PlasticError(f"wake: the schedule is at epoch {self.epoch} of {self.epochs}; wake it at its end")
        if stages is None:
            first = self.stages[: self._first]
            start = next((i for i, s in enumerate(first) if s.plastic), len(first))
            stages = first[start:]
        if not any(s.epochs for s in stages):
            raise PlasticError("wake: there is no plastic stage to repeat; give stages with epochs")
        self._rounds.append(len(self.stages))
        self.stages += [s for s in stages if s.epochs]
        if self.growth is not None:
            self.growth.reset()
        if self.controller is not None:
            self.controller.reset()
        if self.stage.plastic and 0 < self.net.k < math.inf:  # the round before did not harden
            self.net.k = self.stage.k
            self._open(self.stage.k)
            self._drop_gate_state()
        else:
            self._enter(self.stage)

    def _drop_gate_state(self) -> None:
        logits = {g.phi for g in self.net.all_gates()}
        for optimizer in self.optimizers:
            for phi in logits & optimizer.state.keys():
                del optimizer.state[phi]

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the stages that `wake` added, the states of growth and the budget, and what latency was measured;
        the network has its own."""
        latency = self.net.latency
        return {
            "latency": None if latency is None else latency.as_dict(),
            "epoch": self.epoch,
            "rounds": list(self._rounds),
            "woken": [list(astuple(s)) for s in self.stages[self._first :]],
            "growth": None if self.growth is None else self.growth.state_dict(),
            "budget": None if self.controller is None else self.controller.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Load the network's state too: it holds k and the sizes.

        Raises `PlasticError`, and changes nothing, when the state has an epoch that this schedule does not, or growth
        or budget differ.
        """
        epoch, growth, budget = state.get("epoch"), state.get("growth"), state.get("budget")
        try:
            stages = self.stages[: self._first] + [Stage(*s) for s in state.get("woken", ())]
        except TypeError:
            raise PlasticError(f"the state has stages that are none: {state['woken']!r}") from None
        total = sum(s.epochs for s in stages)
        if type(epoch) is not int or not 0 <= epoch <= total:
            raise PlasticError(f"the state is at epoch {epoch!r}, but this schedule has {total}")
        for name, saved, own in (("growth", growth, self.growth), ("a budget", budget, self.controller)):
            if (saved is None) != (own is None):
                raise PlasticError(
                    f"the state was saved with {name} and this schedule has none, or the other way round"
                )
        rounds = state.get("rounds", [0])
        if not isinstance(rounds, list) or not rounds or any(type(r) is not int for r in rounds):
            raise PlasticError(f"the state has rounds that are none: {rounds!r}")
        latency = None if state.get("latency") is None else Latency.from_dict(state["latency"])
        own = None if self.growth is None else self.growth.state_dict()
        if self.growth is not None and growth is not None:
            self.growth.load_state_dict(growth)
        if self.controller is not None:
            try:
                self.controller.load_state_dict(budget)
            except PlasticError:
                if self.growth is not None and own is not None:
                    self.growth.load_state_dict(own)
                raise
        self.epoch, self.stages, self._rounds = epoch, stages, list(rounds)
        stage, place = self._place()
        self.net.k = stage.k_of(min(epoch - self._begin(place), stage.epochs - 1))
        if latency is not None:
            self.net.use_latency(latency)
