"""Writes the state of a run after each epoch, and restores it for the run that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plasticnet.apps.finite import Guard
from plasticnet.apps.identity import differences
from plasticnet.errors import PlasticError
from plasticnet.files.checkpoints import load_checkpoint, save_checkpoint
from plasticnet.net import PlasticNet
from plasticnet.training.schedule import Schedule

_KEYS = {"net", "optimizer", "schedule", "rng", "history", "config", "model", "mode", "data_sha256"}


def save_run(
    path: Path,
    net: PlasticNet,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    history: list[dict[str, Any]],
    identity: Mapping[str, Any],
) -> None:
    """Write the state of a run and of torch's random numbers into a file, which is replaced.

    Args:
        path: The file.
        net: The network.
        optimizer: Its optimizer.
        schedule: Its schedule.
        history: The records of the epochs that are over.
        identity: What the run is, as `plasticnet.apps.identity.identity` returns it.
    """
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint({**state, "rng": random_states(net), "history": history, **identity}, path)


def restore_run(
    path: Path,
    net: PlasticNet,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    identity: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Bring a run that was just prepared to the state that a file holds.

    Args:
        path: The file.
        net: The network.
        optimizer: Its optimizer.
        schedule: Its schedule.
        identity: What the run is, as `plasticnet.apps.identity.identity` returns it.

    Returns:
        The records of the epochs that are over, and the states of torch's random numbers, for `set_random_states`.

    Raises:
        PlasticError: The file is damaged, is of another run, or holds numbers that are not finite.
    """
    way_out = "remove this file to start this run anew"
    try:
        saved = load_checkpoint(path)
    except PlasticError as error:
        raise PlasticError(f"{error}; {way_out}") from error
    if not isinstance(saved, dict) or saved.keys() != _KEYS:
        raise PlasticError(f"{path} is not a checkpoint of a training run, or one of another version; {way_out}")
    changed = differences(_flat(saved), _flat(identity))
    if changed:
        raise PlasticError(
            f"{path} belongs to a run with another configuration: {changed}; it can only be resumed as it began"
        )
    guard = Guard(net, optimizer)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    found = guard.culprit()
    if found is not None:
        raise PlasticError(f"{path} cannot be resumed: {found} is not finite (NaN or infinite); start the run anew")
    return saved["history"], saved["rng"]


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
