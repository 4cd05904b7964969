"""A schedule whose steps are late, so that what a training loop saves is the network that was validated.

A loop saves its checkpoints at the end of an epoch or after the validation, and knows the validation loss by then. If
the schedule had already cut the network, the weights in the checkpoint would not be those that the loss belongs to.
So the step of an epoch is taken when the next one begins, or when the training ends. A loop that goes on from a
checkpoint takes it first. Steps draw random numbers of their own, so that it does not matter whether a loop restores
its random numbers before or after a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from plasticnet.errors import PlasticError
from plasticnet.integrations.chance import own_random
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import check_optimizers, listed
from plasticnet.training.schedule import Schedule
from plasticnet.training.stages import Change, Stage

_KEYS = ("schedule", "begun", "val_loss", "seed")


class LateSchedule:
    """A schedule that is built before a checkpoint is loaded, gets its optimizers afterwards, and takes its steps late.

    It is built first because shares in a budget are those of the whole network, which a checkpoint may make smaller.

    Attributes:
        schedule: The schedule.
        val_loss: The last validation loss that is known, the mean over all ranks; or None.

    Args:
        net: The network, before a checkpoint is loaded into it.
        stages: The stages.
        options: The keyword arguments of `Schedule`.
    """

    def __init__(self, net: PlasticNet, stages: Sequence[Stage], **options: Any) -> None:
        self.schedule = Schedule(net, [], stages, **options)
        self.val_loss: float | None = None
        self._begun: int | None = None  # the epoch of the loop in which the schedule began
        self._again = False  # whether the loop may count its epochs anew
        self._warned = False
        self._seed = torch.initial_seed()
        self._loaded: Mapping[str, Any] | None = None  # a state that waits for the optimizers

    @property
    def net(self) -> PlasticNet:
        """The network."""
        return self.schedule.net

    def attach(self, optimizers: Optimizer | Sequence[Optimizer]) -> None:
        """Take the optimizers, now that they exist, and then the state that was loaded, if there is one.

        Raises:
            PlasticError: There are no optimizers, they lack a parameter or cannot follow a change of size, the state
                does not fit, or the network was loaded from a checkpoint without a state of the schedule.
        """
        found = listed(optimizers)
        if not found:
            raise PlasticError("there is no optimizer: build one from net.param_groups(lr)")
        check_optimizers(found, dict(self.net.named_parameters()))
        if self._loaded is not None:
            self.schedule.load_state_dict(self._loaded["schedule"])
            self._begun, self.val_loss = self._loaded["begun"], self._loaded["val_loss"]
            self._seed = self._loaded["seed"]
            self._loaded = None
        elif self.net.k != self.schedule.timeline.k:
            raise PlasticError(
                f"the network is at k={self.net.k:g}, and its schedule at k={self.schedule.timeline.k:g}: it was "
                "loaded from a checkpoint that holds no state of this callback. Go on from one that was written with "
                "the callback, or set net.k and begin anew without a checkpoint"
            )
        else:
            self._again = True
        self.schedule.optimizers, self._warned = found, False

    def observe(self, val_loss: float) -> None:
        """Note the validation loss of an epoch; all ranks must call this, and the mean counts."""
        self.val_loss = self.net.ranks.mean(float(val_loss), self.net.like.device)

    def due(self, epoch: int) -> bool:
        """Return whether a step is due.

        Args:
            epoch: How many epochs of the loop are over, which may have begun before the schedule.

        Raises:
            PlasticError: The schedule has missed epochs of the loop.
        """
        if self._begun is None:
            self._begun = epoch
        elif self._again and epoch - self._begun < self.schedule.epoch:
            self._begun = epoch - self.schedule.epoch  # another loop goes on with the schedule, and counts from 0
        self._again = False
        over, ended = epoch - self._begun, self.schedule.epoch
        if min(over, self.schedule.epochs) - ended > 1:
            raise PlasticError(
                f"{over} epochs are over, and the schedule has ended {ended} of them: some were trained without the "
                "callback. Go on from a checkpoint that was written with it"
            )
        return min(over, self.schedule.epochs) > ended

    def advance(self, epoch: int) -> Change | None:
        """Take the step of the last epoch, unless it was taken or the schedule is over.

        Args:
            epoch: How many epochs of the loop are over, which may have begun before the schedule.

        Returns:
            What the step did, or None where there was none.

        Raises:
            PlasticError: As `due` and `Schedule.step` raise it.
        """
        if not self.due(epoch):
            return None
        with own_random(self.net.like.device, (self._seed + self.schedule.epoch) % 2**63):
            return self.schedule.step(self.val_loss)

    def announce(self, last: int | None) -> None:
        """Warn where the loop will end before the schedule does; call this when its first epoch has begun.

        Args:
            last: How many epochs of the loop will be over when it ends; None or less than 0 where it does not say.
        """
        if last is None or last < 0:
            return
        over = last - (self._begun or 0)
        if over < self.schedule.epochs and not self._warned:
            self._warn(f"the Trainer ends after {over} of the {self.schedule.epochs} epochs of the stages")

    def finish(self, epoch: int) -> None:
        """Take the step of the last epoch, and warn where the loop has ended before the network could harden.

        Args:
            epoch: How many epochs of the loop are over, which may have begun before the schedule.

        Raises:
            PlasticError: As `due` and `Schedule.step` raise it.
        """
        self.advance(epoch)
        ended, ends = self.schedule.epoch, 0
        for stage in self.schedule.stages:
            ends += stage.epochs
            if stage.plastic and ended < ends and not self._warned:
                self._warn(
                    f"the training has ended after {ended} of the {self.schedule.epochs} epochs of the stages: the "
                    f"network is at k={self.net.k:g} and has not hardened. A budget is met only then"
                )

    def _warn(self, message: str) -> None:
        """Warn once after `attach`."""
        self._warned = True
        warnings.warn(
            f"{message}. Let the Trainer have as many epochs as the stages, or go on with the same callback",
            UserWarning,
            stacklevel=4,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, beside the states of the network and of the optimizers."""
        if self._loaded is not None:
            return dict(self._loaded)
        values = (self.schedule.state_dict(), self._begun, self.val_loss, self._seed)
        return dict(zip(_KEYS, values, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what `state_dict` returned, until `attach` restores it.

        Raises:
            PlasticError: It is no such state.
        """
        if not isinstance(state, Mapping) or any(key not in state for key in _KEYS):
            raise PlasticError(f"the state of the callback lacks some of {', '.join(_KEYS)}")
        self._loaded = state
