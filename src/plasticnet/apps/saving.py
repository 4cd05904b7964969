"""Writes the state of a run after each epoch, and restores it for the run that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plasticnet.apps.finite import Guard
from plasticnet.apps.settings import differences
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
        identity: What the run is, as `plasticnet.apps.settings.identity` returns it.
    """
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint({**state, "rng": torch.get_rng_state(), "history": history, **identity}, path)


def restore_run(
    path: Path,
    net: PlasticNet,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    identity: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], Tensor]:
    """Bring a run that was just prepared to the state that a file holds.

    Args:
        path: The file.
        net: The network.
        optimizer: Its optimizer.
        schedule: Its schedule.
        identity: What the run is, as `plasticnet.apps.settings.identity` returns it.

    Returns:
        The records of the epochs that are over, and the state of torch's random numbers.

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


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a run with its settings side by side."""
    return {**identity["config"], **{name: identity[name] for name in ("model", "mode", "data_sha256")}}
