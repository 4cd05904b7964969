"""Saves the state of a run at the end of each epoch and within long ones, and restores it for the same run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plasticnet.apps.checkpoints import Checkpoints
from plasticnet.apps.console import print_line
from plasticnet.apps.finite import Guard
from plasticnet.apps.identity import differences
from plasticnet.apps.preparing import Training
from plasticnet.apps.stopping import Stop
from plasticnet.errors import PlasticError
from plasticnet.files.disk import remove_file
from plasticnet.net import PlasticNet

_KEYS = {"net", "optimizer", "schedule", "rng", "history", "place", "config", "model", "mode", "data_sha256"}
SECONDS = 600.0  # within an epoch, the state is saved after so many seconds unless the user says otherwise


@dataclass
class Place:
    """Where in an epoch a training stands.

    Attributes:
        order: The indices of the training rows in the order in which the epoch reads them, shape (rows,).
        total: The sum of the losses of the rows that were read, a scalar.
        step: How many steps are over.
        seconds: How many seconds of the CPU they have taken.
    """

    order: Tensor
    total: Tensor
    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Restored:
    """What a run goes on with, beside its network, optimizer and schedule.

    Attributes:
        history: The records of the epochs that are over.
        rng: The states of torch's random numbers, for `set_random_states`.
        place: Where in the next epoch the run stands, or None where it stands before it.
        passed: Checkpoints that are newer, and cannot be read or are missing.
        why: What became of them, as a line for the user; nothing where there are none.
    """

    history: list[dict[str, Any]]
    rng: dict[str, Tensor]
    place: Place | None
    passed: tuple[Path, ...]
    why: str


class Keeper:
    """Saves the state of a run, which it can also bring to a halt.

    Args:
        checkpoints: Where it is saved; nowhere if this is None.
        training: The network, its optimizer and its schedule.
        history: The records of the epochs that are over, to which the run adds.
        identity: What the run is, as `plasticnet.apps.identity.identity` returns it.
        guard: Says whether all numbers are finite. A state in which some are not is not saved.
        seconds: After so many seconds since the last time, the state is saved within an epoch.
        stop: Whether the run is to stop.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        training: Training,
        history: list[dict[str, Any]],
        identity: Mapping[str, Any],
        guard: Guard,
        seconds: float,
        stop: Stop,
    ) -> None:
        self.checkpoints, self.training = checkpoints, training
        self.history, self.identity, self.guard, self.seconds, self.stop = history, identity, guard, seconds, stop
        self._saved = time.monotonic()

    def after_step(self, place: Place) -> None:
        """Save the state within an epoch where it is time to, or where the run is to stop.

        Raises:
            Interrupted: The run is to stop, and its state was saved.
            PlasticError: The state cannot be written, or is not finite.
        """
        if self.stop.signal is not None or time.monotonic() - self._saved >= self.seconds:
            if self.checkpoints is not None:
                self.guard.check("before saving")
                self._save(self.checkpoints, place, best=False)
            self.stop.check()

    def after_epoch(self) -> None:
        """Save the state at the end of an epoch, whose record is the last of the history."""
        if self.checkpoints is not None:
            losses = [record["val_loss"] for record in self.history]
            self._save(self.checkpoints, None, best=losses[-1] < min(losses[:-1], default=float("inf")))

    def _save(self, checkpoints: Checkpoints, place: Place | None, *, best: bool) -> None:
        """Write the state of the run and of torch's random numbers."""
        net = self.training.net
        state = {name: part.state_dict() for name, part in self.training._asdict().items()}
        here = None if place is None else dict(vars(place))
        beside = {"rng": random_states(net), "history": self.history, "place": here}
        checkpoints.write({**state, **beside, **self.identity}, best=best)
        self._saved = time.monotonic()


def restore_run(
    checkpoints: Checkpoints,
    training: Training,
    identity: Mapping[str, Any],
) -> Restored | None:
    """Bring a run that was just prepared to the state that its newest checkpoint holds which can be read.

    Args:
        checkpoints: The checkpoints.
        training: The network, its optimizer and its schedule.
        identity: What the run is, as `plasticnet.apps.identity.identity` returns it.

    Returns:
        What else the run goes on with, or None where there is no checkpoint.

    Raises:
        PlasticError: No file can be read, or the one that can is of another run, or holds numbers that are not finite.
    """
    found = checkpoints.read()
    if found is None:
        return None
    path, saved = found.path, found.content
    if not isinstance(saved, dict) or saved.keys() | {"place"} != _KEYS:
        raise PlasticError(
            f"{path} is not a checkpoint of a training run, or one of another version; remove this file to start this "
            "run anew"
        )
    changed = differences(_flat(saved), _flat(identity))
    if changed:
        raise PlasticError(
            f"{path} belongs to a run with another configuration: {changed}; it can only be resumed as it began"
        )
    guard = Guard(training.net, training.optimizer)
    for name, part in training._asdict().items():
        part.load_state_dict(saved[name])
    culprit = guard.culprit()
    if culprit is not None:
        raise PlasticError(f"{path} cannot be resumed: {culprit} is not finite (NaN or infinite); start the run anew")
    place = _placed(saved.get("place"), training.net)
    return Restored(saved["history"], saved["rng"], place, found.passed, found.why)


def resume_run(
    checkpoints: Checkpoints,
    training: Training,
    identity: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], Place | None]:
    """Let a run that was just prepared go on from its newest checkpoint that can be read, if there is one.

    Torch's random numbers go on, too, and what could not be read is removed and named in a line.

    The arguments and the errors are those of `restore_run`.

    Returns:
        The records of the epochs that are over, and where in the next epoch the run stands, as `Restored` has them.
    """
    found = restore_run(checkpoints, training, identity)
    if found is None:
        return [], None
    set_random_states(found.rng)
    if found.why:
        print_line(found.why)
    for path in found.passed:  # the next checkpoint would take it for a good one
        remove_file(path)
    return found.history, found.place


def _placed(saved: Mapping[str, Any] | None, net: PlasticNet) -> Place | None:
    """Return where in an epoch a run stands."""
    if saved is None:
        return None
    return Place(saved["order"], saved["total"].to(net.like.device), saved["step"], saved["seconds"])


def random_states(net: PlasticNet) -> dict[str, Tensor]:
    """Return the states of torch's random numbers: of the CPU, and of the device of a network."""
    states = {"cpu": torch.get_rng_state()}
    kind = _device(net)
    return states if kind == "cpu" else {**states, kind: torch.get_device_module(kind).get_rng_state()}


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Bring torch's random numbers to the states that `random_states` returned."""
    for kind, state in states.items():
        if kind == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(kind).set_rng_state(state)


def _device(net: PlasticNet) -> str:
    """Return the kind of device that a network lies on."""
    return next((p.device.type for p in net.parameters()), "cpu")


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a run with its settings side by side."""
    return {**identity["config"], **{name: identity[name] for name in ("model", "mode", "data_sha256")}}
