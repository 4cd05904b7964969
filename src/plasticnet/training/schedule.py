"""Schedule: moves a network through its stages, and cuts, grows and hardens it on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from plasticnet.budgets.budget import Budget
from plasticnet.budgets.projection import decide
from plasticnet.errors import PlasticError
from plasticnet.gates.site import INITIAL_LOGIT, OPEN_LOGIT, probabilities, set_logits, transition
from plasticnet.growing.rule import LATE, GrowthRule, Turnover
from plasticnet.learning.pressure import Pressure
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import check_optimizers, listed
from plasticnet.surgery.survivors import check_finite, check_multiple
from plasticnet.surgery.undo import undone_on_error
from plasticnet.tools.batches import check_batches
from plasticnet.tools.gradients import outside_inference_mode
from plasticnet.tools.reals import as_float, shown
from plasticnet.tools.sharding import held_parameters, refuse_sharded
from plasticnet.training.cutting import cut_epoch, forget_gates, harden
from plasticnet.training.metrics import metrics
from plasticnet.training.pressing import pressing
from plasticnet.training.stages import Change, Stage
from plasticnet.training.state import restore, state_of
from plasticnet.training.stillness import Stillness
from plasticnet.training.timeline import Timeline


class Schedule:
    """The stages of a training, through which `step` moves a network at the end of every epoch.

    Plastic stages: on entering one from ordinary training, the open gates start at pi = 0.95. At the end of each of its
    epochs, units with pi below ``hibernate`` are cut, once together they are 2 % of the MACs or of the parameters, and
    ``growth`` adds units and lets worthless ones go. Where fewer units than `Site.minimum` are open, the best ones
    start at pi = 0.95 again. When a stage at k = infinity follows, the network hardens: units with pi < 1/2 are cut.

    Pressure: with a ``pressure`` or a ``budget``, add `penalty` to the loss of every training step. A pressure says
    what the cost of the network is worth, and a budget what it may be in the end.

    Budgets: on hardening, the best units that fit stay (see `Budget`): the open units cost at most the target, and no
    closed unit would fit beside them. Where more units were cut before than the budget asks for, new ones take their
    place. Growth keeps to a quarter above a target, and stops when half of the plastic epochs are over.

    Several ranks: all of them must call `step`, each with its own ``val_loss``. The mean decides.

    Args:
        net: The network.
        optimizer: The optimizer, or all of those, that hold the parameters and the gates.
        stages: The stages in their order. Those without epochs are left out.
        hibernate: The probability below which a unit is cut in a plastic stage, from 0 to 1.
        growth: How the network grows, or None. Each schedule needs one of its own.
        pressure: What the cost of the network is worth in the loss, or None.
        budget: What the network may cost or lose in the end, or None. It presses by itself, without a ``pressure``.
        multiple_of: What widths are kept at multiples of, as in `PlasticNet.prune`, also by `PlasticNet.compact`.
        repair: Inputs, in a form that `pn.repair` takes, or None. Where the budget closes units that were open, as the
            network hardens, what reads them is then refitted on these inputs.
        on_resize: A function that is called with the network at the end of a `step` in which sizes changed. It should
            renew whatever refers to the old parameters, such as a copy for an average of the weights. A
            `DistributedDataParallel` follows by itself.
        on_change: A function that is called at the end of every `step`, after ``on_resize``, with the numbers of the
            epoch: a dict of plain numbers by name, for TensorBoard, W&B, MLflow or a list. "epoch" says how many epochs
            are over, and "val_loss" is there if it was given; `plasticnet.training.metrics.metrics` names the others.

    Raises:
        PlasticError: There are no epochs, growth has no plastic stage, an option is out of range, the optimizers lack a
            parameter of the network or cannot follow a change of size, both a pressure and a budget are given, a
            latency was not measured, the smallest network is not within the budget, or no stage hardens the network to
            it. Nothing was changed.

    Example:
        >>> import torch, plasticnet as pn
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(32, 4), torch.randint(3, (32,))
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> net = pn.PlasticNet(model, (x,))
        >>> optimizer = torch.optim.Adam(net.param_groups(lr=0.01))
        >>> stages = [pn.Stage(3, k=7.0), pn.Stage(1)]
        >>> schedule = pn.Schedule(net, optimizer, stages, budget=pn.Budget(units=0.5))
        >>> for epoch in range(schedule.epochs):
        ...     loss = net.expected_loss(lambda: torch.nn.functional.cross_entropy(net(x), y, reduction="none"))
        ...     optimizer.zero_grad()
        ...     (loss + schedule.penalty()).backward()
        ...     optimizer.step()
        ...     change = schedule.step()
        >>> net.compact()[0]
        Linear(in_features=4, out_features=4, bias=True)
    """

    @outside_inference_mode()
    def __init__(
        self,
        net: PlasticNet,
        optimizer: Optimizer | Sequence[Optimizer],
        stages: Sequence[Stage],
        *,
        hibernate: float = 0.01,
        growth: GrowthRule | None = None,
        pressure: Pressure | None = None,
        budget: Budget | None = None,
        multiple_of: int = 1,
        repair: Iterable[Any] | None = None,
        on_resize: Callable[[PlasticNet], object] | None = None,
        on_change: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        self.timeline = Timeline(stages)
        self.net = net
        self.optimizers = listed(optimizer)
        check_optimizers(self.optimizers, held_parameters(net))
        if not 0 <= hibernate <= 1:
            raise PlasticError(f"hibernate={hibernate}: the probability below which a unit is cut, from 0 to 1")
        check_multiple(multiple_of)
        self.hibernate, self.growth = hibernate, growth
        self.multiple_of, self.repair = multiple_of, repair
        self.on_resize, self.on_change = on_resize, on_change
        if repair is not None:
            check_batches(repair)
            refuse_sharded(net, "a schedule with repair=")
        self.force = pressing(net, self.stages, budget, pressure, growth)
        if growth is not None:
            growth.take(net, self.force)
        net.multiple_of = multiple_of
        # The gates of a network that has been trained or loaded stay, or will be loaded from a checkpoint.
        fresh = all(bool((g.phi == INITIAL_LOGIT).all()) for g in net.weights.values()) and all(
            bool(((s.phi == INITIAL_LOGIT) | s.asleep).all()) for s in net.sites.values()
        )
        before, net.k = net.k, self.timeline.k
        if fresh and 0 < net.k < math.inf and before != net.k:
            self._open()
        self._stillness = Stillness(net)

    @property
    def stages(self) -> list[Stage]:
        """The stages that have epochs; those that `wake` has added come last."""
        return self.timeline.stages

    @property
    def stage(self) -> Stage:
        """The stage of the epoch that is running, or the last stage once the schedule is over."""
        return self.timeline.stage

    @property
    def epochs(self) -> int:
        """The number of epochs of all stages together."""
        return self.timeline.epochs

    @property
    def epoch(self) -> int:
        """The epoch that is running, counted from 0."""
        return self.timeline.epoch

    @property
    def rounds(self) -> int:
        """The number of rounds: one, and one more for each `wake`."""
        return len(self.timeline.rounds)

    def penalty(self) -> Tensor:
        """Return what the pressure or the budget adds to the loss, a scalar.

        It is 0 where neither was given, outside of plastic stages, and until growth has stopped. A pressure does not
        wait for `Growth.paper`, which does not stop by itself.

        Call it once after each call of `PlasticNet.expected_loss`, because every call moves the multipliers of a budget
        by a step. When gradients are accumulated, divide the sum of both by the number of batches, and not the losses
        within the closure: ``((net.expected_loss(closure) + schedule.penalty()) / n).backward()``.
        """
        self.force.steps += 1
        if not self.stage.plastic:
            return self.net.like.new_zeros(())
        return self.force.penalty(self.net, self.growth, self.epoch, self.timeline.plastic_epochs()[1])

    def step(self, val_loss: float | None = None) -> Change:
        """End an epoch: cut and grow the network, and set k for the next epoch.

        Args:
            val_loss: The loss on held-out data. It is needed at the end of every plastic epoch with `Growth.paper` or
                with `Budget(loss=...)`. The latter compares it with the losses of earlier epochs, if they were given.

        Returns:
            What was done.

        Raises:
            PlasticError: The schedule is over; a validation loss is needed in a plastic stage and is missing or NaN;
                gates are not finite; the optimizers no longer fit the network; the budget has become impossible;
                growth goes on, and the epoch has not called `penalty`, or not `PlasticNet.expected_loss`;
                or the inputs to repair it on have no form that is known. Nothing was changed, as when the call is
                interrupted or memory runs out.
        """
        with self.net.lock, outside_inference_mode():
            return self._ended(val_loss)

    def _ended(self, val_loss: float | None) -> Change:
        """End an epoch, as `step` does, while no other thread uses the network."""
        timeline, net, force = self.timeline, self.net, self.force
        if timeline.over:
            raise PlasticError(f"the schedule is over: it has {self.epochs} epochs, and all of them were ended")
        stage, loss = timeline.stage, self._loss(val_loss)
        check_optimizers(self.optimizers, held_parameters(net))
        if stage.plastic:
            check_finite(net)
            if self.growth is not None:
                self.growth.check(net, force.steps)
            if force.targets and timeline.ends_stage:
                decide(net, force.targets)
        undecided = transition(probabilities(net.all_gates(), net.k).detach())
        parameters = list(net.model.parameters())
        with self._undone_on_error():
            cut, grown = self._end_epoch(loss)
            if not self.stage.plastic or timeline.over:
                net.sampler.missed = None
            self._stillness.begin(net)
        rebuilt = any(p is not q for p, q in zip(parameters, net.model.parameters(), strict=True))
        if self.on_resize is not None and (cut or grown or rebuilt):
            self.on_resize(net)
        change = Change(cut, grown, net.k, undecided)
        if self.on_change is not None:
            given = {} if val_loss is None else {"val_loss": float(val_loss)}
            self.on_change({"epoch": timeline.epoch, **given, **metrics(net, self.growth, force, change)})
        return change

    def _end_epoch(self, loss: float) -> tuple[dict[str, int], dict[str, int]]:
        """Do what `step` does; ``loss`` is the mean validation loss or NaN. Return what was cut, and what was added."""
        timeline, net, force = self.timeline, self.net, self.force
        stage, place, (begin, end) = timeline.stage, timeline.place, timeline.plastic_epochs()
        if stage.plastic:
            self._stillness.end(net, timeline.ends_stage)
        timeline.epoch += 1
        passed, entered = timeline.epoch - begin, timeline.place != place
        # The gradient belongs to the sizes before, and a checkpoint at the end of an epoch needs none.
        net.sampler.gradient = None
        force.step(loss, stage.plastic, passed, max(end - begin, 1))
        options = {"hibernate": self.hibernate, "multiple_of": self.multiple_of}
        cut = cut_epoch(net, self.optimizers, force, **options) if stage.plastic else {}
        grown: Mapping[str, int] = {}
        if stage.plastic and not entered:
            changes = self._grow(loss, passed / (end - begin))
            cut, grown = _together(cut, changes.cut), changes.grown
        if entered:
            more_cut, more_grown = self._enter()
            cut, grown = _together(cut, more_cut), _together(grown, more_grown)
        elif not timeline.over:
            net.k = timeline.k
        elif stage.plastic:
            forget_gates(net, self.optimizers)
        return cut, dict(grown)

    def _loss(self, val_loss: float | None) -> float:
        """Return the mean validation loss over all ranks, or NaN where there is none and none is needed."""
        given = None if val_loss is None else as_float(val_loss)
        if val_loss is not None and given is None:
            raise PlasticError(f"val_loss={shown(val_loss)}: the validation loss is a number")
        by_loss, plastic = self.force.loss is not None, self.stage.plastic
        if not by_loss and not (plastic and self.growth is not None and self.growth.needs_loss):
            return math.nan
        loss = self.net.ranks.mean(math.nan if given is None else given, self.net.like.device)
        if plastic and math.isnan(loss):
            what = "the budget" if by_loss else "growth"
            raise PlasticError(f"val_loss={val_loss}: {what} needs the validation loss of every plastic epoch")
        if loss == -math.inf:  # after which no loss would ever be good enough
            raise PlasticError("val_loss=-inf: a loss that is so small is wrong; check the validation data")
        return loss

    def _grow(self, loss: float, over: float) -> Turnover:
        """Let the network grow, if there is growth; a budget stops a rule that does not stop by itself."""
        if self.growth is None:
            return Turnover()
        if self.growth.endless and self.force.ends_growth(self.net, over >= LATE):
            self.growth.stop()
        return self.growth.step(self.net, self.optimizers, val_loss=loss, over=over)

    def _enter(self) -> tuple[dict[str, int], dict[str, int]]:
        """Begin the stage that is running: set its k, and then harden the network or open the gates.

        If k changes, the optimizers forget the gates' moments, which belong to the old k.

        Returns:
            How many units were cut, and how many were added, for each site where there were any.
        """
        before, self.net.k = self.net.k, self.stage.k
        changed: tuple[dict[str, int], dict[str, int]] = {}, {}
        if self.net.k == before:
            return changed
        if math.isinf(self.net.k):
            changed = harden(self.net, self.optimizers, self.force, self.multiple_of, self.repair)
        elif self.net.k and (before == 0 or math.isinf(before)):
            self._open()
        forget_gates(self.net, self.optimizers)
        return changed

    def _open(self) -> None:
        """Set the open gates to pi = 0.95, and hold all units open if growth begins."""
        for g in self.net.all_gates():
            set_logits(g, g.open, OPEN_LOGIT / self.net.k)
        if self.growth is not None:
            self.growth.hold(self.net)

    def wake(self, stages: Sequence[Stage] | None = None) -> None:
        """Begin another round at the end of the schedule, for instance when the data have changed.

        Open gates start at pi = 0.95 again. Growth and the multipliers of the budget begin anew. The targets of the
        budget stay, and so does a pressure.

        Args:
            stages: The stages to append; by default the stages of the first round from its first plastic one on.

        Raises:
            PlasticError: The schedule is not over, there are no epochs to add, or the budget has become impossible.
                Nothing was changed.
        """
        with self._undone_on_error():
            self.timeline.add_round(stages)
            self.force.reset()
            if self.growth is not None:
                self.growth.reset()
            if self.stage.plastic and 0 < self.net.k < math.inf:  # The round before has ended without hardening.
                self.net.k = self.stage.k
                self._open()
                forget_gates(self.net, self.optimizers)
            else:
                self._enter()
            self._stillness.begin(self.net)

    def _undone_on_error(self) -> AbstractContextManager[None]:
        """Return a context that puts everything back when it is left by an error."""
        parts = (self.timeline, self._stillness, self.growth, self.force, self.net.sampler)
        return undone_on_error(self.net, self.optimizers, [part for part in parts if part is not None])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs of the schedule; the network has a state dict of its own.

        The state holds the epoch, the stages that `wake` has added, the states of growth and of the pressure or the
        budget, the measured latency, what is known of the closure, and within an epoch the last gradient of the gates.
        """
        return {**self.timeline.state_dict(), **state_of(self.net, self.growth, self.force)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Load the state of the network as well, because it holds k and the sizes.

        Raises:
            PlasticError: The state has an epoch that this schedule does not have, or it does not fit the network, the
                growth, the pressure or the budget of this schedule. Nothing was changed.
        """
        timeline = self.timeline.restored(state)
        with self._undone_on_error():
            restore(state, self.net, self.growth, self.force)
            self.net.k, self.net.multiple_of = timeline.k, self.multiple_of
            if self.growth is not None and timeline.stage.plastic and not timeline.over:
                self.growth.attend(self.net)
            self.timeline = timeline


def _together(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of two counts of units."""
    return {name: counts.get(name, 0) + more.get(name, 0) for name in {**counts, **more}}
