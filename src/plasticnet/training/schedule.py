"""Schedule: k over the stages, units that hibernate are cut, new ones wake, budgets are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from plasticnet.budgets.budget import Budget, present
from plasticnet.budgets.projection import decide
from plasticnet.cost.latency import Latency
from plasticnet.errors import PlasticError
from plasticnet.gates.site import INITIAL_LOGIT, OPEN_LOGIT, probabilities, set_logits, transition
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import check_optimizers, listed
from plasticnet.surgery.survivors import check_finite, check_multiple
from plasticnet.training.controller import Controller
from plasticnet.training.cutting import cut_hibernating, forget_gates, harden, kept_to_loss, recover
from plasticnet.training.growth import Growth
from plasticnet.training.stages import Change, Stage, check_hardening
from plasticnet.training.timeline import Timeline


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
        self.timeline = Timeline(stages)
        self.net = net
        self.optimizers = listed(optimizer)
        check_optimizers(self.optimizers, dict(net.named_parameters()))
        if not 0 <= hibernate <= 1:
            raise PlasticError(f"hibernate={hibernate}: the probability below which a unit is cut, from 0 to 1")
        check_multiple(multiple_of)
        self.hibernate = hibernate
        self.growth = growth
        self.multiple_of = multiple_of
        self.on_resize = on_resize
        if growth is not None:
            present(net, growth.cost)  # raises where it is not known
        if budget is not None:
            check_hardening(budget, self.stages)
        self.controller = None if budget is None else Controller(net, budget)
        if self.controller is not None and self.controller.targets:
            decide(net, self.controller.targets)
        # A network that has been trained or loaded is not changed here; its checkpoint follows, or its gates stay.
        fresh = bool((net.phi() == INITIAL_LOGIT).all())
        before, net.k = net.k, self.timeline.k
        if fresh and 0 < net.k < math.inf and before != net.k:
            self._open()

    @property
    def stages(self) -> list[Stage]:
        """The stages that have epochs; those that `wake` added come last."""
        return self.timeline.stages

    @property
    def stage(self) -> Stage:
        """The stage of the epoch that is running (the last one, at the end)."""
        return self.timeline.stage

    @property
    def epochs(self) -> int:
        """The epochs of all stages together."""
        return self.timeline.epochs

    @property
    def epoch(self) -> int:
        """The epoch that is running, the first one being 0."""
        return self.timeline.epoch

    @property
    def rounds(self) -> int:
        """One, and one for each `wake`."""
        return len(self.timeline.rounds)

    def penalty(self) -> Tensor:
        """What the budget adds to the loss, a scalar; 0 without one, and outside of plastic stages.

        To be called once for each `PlasticNet.expected_loss`, after it: every call is a step of the multipliers.
        When gradients are accumulated, divide both alike.
        """
        if self.controller is not None:
            self.controller.steps += 1
            if self.stage.plastic and (self.growth is None or self.growth.stopped):
                return self.controller.penalty(self.net, self.epoch, self.timeline.plastic_epochs()[1])
        return self.net.like.new_zeros(())

    def step(self, val_loss: float | None = None) -> Change:
        """End an epoch. ``val_loss`` is the loss on held-out data; growth and `Budget(loss=...)` decide by it.

        Raises `PlasticError`, and changes nothing, at the end of the schedule; in a plastic stage when a validation
        loss is needed and there is none, or it is NaN, and when gates are not finite; and when the budget has
        become impossible.
        """
        timeline, net, controller = self.timeline, self.net, self.controller
        if timeline.over:
            raise PlasticError(f"the schedule is over: it has {self.epochs} epochs, and all of them were ended")
        stage, place, (begin, end) = timeline.stage, timeline.place, timeline.plastic_epochs()
        loss = self._loss(val_loss)
        check_optimizers(self.optimizers, dict(net.named_parameters()))
        if stage.plastic:
            check_finite(net)
            if controller is not None and controller.targets and timeline.ends_stage:
                decide(net, controller.targets)
        undecided = transition(probabilities(net.all_gates(), net.k).detach())
        parameters = list(net.model.parameters())
        timeline.epoch += 1
        passed, entered = timeline.epoch - begin, timeline.place != place
        net.sampler.gradient = None  # what a checkpoint does not hold must not matter
        if controller is not None:
            controller.step(loss, stage.plastic, passed, max(end - begin, 1))
        cut: dict[str, int] = {}
        grown: dict[str, int] = {}
        if stage.plastic:
            cut = self._cut()
            if not entered:
                grown = self._grow(loss, late=2 * passed >= end - begin)
        if entered:
            more_cut, more_grown = self._enter()
            cut, grown = _together(cut, more_cut), _together(grown, more_grown)
        elif not timeline.over:
            net.k = timeline.k
        elif stage.plastic:
            forget_gates(net, self.optimizers)
        rebuilt = any(p is not q for p, q in zip(parameters, net.model.parameters(), strict=True))
        if self.on_resize is not None and (cut or grown or rebuilt):
            self.on_resize(net)
        return Change(cut, grown, net.k, undecided)

    def _loss(self, val_loss: float | None) -> float:
        """The validation loss over all ranks, NaN where there is none and none is needed."""
        by_loss, plastic = self.controller is not None and self.controller.loss is not None, self.stage.plastic
        if not by_loss and not (plastic and self.growth is not None):
            return math.nan
        loss = self.net.ranks.mean(math.nan if val_loss is None else float(val_loss), self.net.like.device)
        if plastic and math.isnan(loss):
            what = "the budget" if by_loss else "growth"
            raise PlasticError(f"val_loss={val_loss}: {what} needs the validation loss of every plastic epoch")
        return loss

    def _cut(self) -> dict[str, int]:
        """Count down the grace of new units, start anew what sites need, and cut what hibernates."""
        for site in self.net.sites.values():
            site.grace.sub_(1).clamp_(min=0)
        recover(self.net, self.optimizers)
        if not kept_to_loss(self.net, self.optimizers, self.controller):
            return {}
        return cut_hibernating(
            self.net, self.optimizers, self.controller, hibernate=self.hibernate, multiple_of=self.multiple_of
        )

    def _grow(self, loss: float, late: bool) -> dict[str, int]:
        """Grow, if there is growth; with a budget only until the network is large enough, or it is late for that."""
        if self.growth is None:
            return {}
        if self.controller is not None and (late or self.controller.outgrown(self.net)):
            self.growth.stop()
        return self.growth.step(self.net, loss, self.optimizers)

    def _enter(self) -> tuple[dict[str, int], dict[str, int]]:
        """Begin the stage that is running: set its k; harden or open the gates; forget the gates' moments, which
        belong to another k. Returns what was cut, and what was added."""
        before, self.net.k = self.net.k, self.stage.k
        changed: tuple[dict[str, int], dict[str, int]] = {}, {}
        if self.net.k == before:
            return changed
        if math.isinf(self.net.k):
            changed = harden(self.net, self.optimizers, self.controller, self.multiple_of)
        elif self.net.k and (before == 0 or math.isinf(before)):
            self._open()
        forget_gates(self.net, self.optimizers)
        return changed

    def _open(self) -> None:
        """Start the open gates at pi = 0.95, and hold them there if growth begins."""
        for g in self.net.all_gates():
            set_logits(g, g.open, OPEN_LOGIT / self.net.k)
        if self.growth is not None:
            self.growth.hold(self.net)

    def wake(self, stages: Sequence[Stage] | None = None) -> None:
        """Begin another round at the end of the schedule, when data have changed, say: append ``stages``, by
        default those from the first plastic one on. Open gates start at pi = 0.95 again, and growth and the budget's
        multipliers anew; the budget's targets stay.

        Raises `PlasticError` before the end, or when there are no epochs to add.
        """
        self.timeline.add_round(stages)
        if self.growth is not None:
            self.growth.reset()
        if self.controller is not None:
            self.controller.reset()
        if self.stage.plastic and 0 < self.net.k < math.inf:  # the round before did not harden
            self.net.k = self.stage.k
            self._open()
            forget_gates(self.net, self.optimizers)
        else:
            self._enter()

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the stages that `wake` added, the states of growth and the budget, and what latency was measured;
        the network has its own."""
        latency = self.net.latency
        return {
            "latency": None if latency is None else latency.as_dict(),
            **self.timeline.state_dict(),
            "growth": None if self.growth is None else self.growth.state_dict(),
            "budget": None if self.controller is None else self.controller.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. Load the network's state too: it holds k and the sizes.

        Raises `PlasticError`, and changes nothing, when the state has an epoch that this schedule does not, or growth
        or budget differ.
        """
        timeline = self.timeline.restored(state)
        growth, budget = state.get("growth"), state.get("budget")
        for name, saved, own in (("growth", growth, self.growth), ("a budget", budget, self.controller)):
            if (saved is None) != (own is None):
                raise PlasticError(
                    f"the state was saved with {name} and this schedule has none, or the other way round"
                )
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
        self.timeline = timeline
        self.net.k = timeline.k
        if latency is not None:
            self.net.use_latency(latency)


def _together(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """The sum of two counts of units."""
    return {name: counts.get(name, 0) + more.get(name, 0) for name in {**counts, **more}}
