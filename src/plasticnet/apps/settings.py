"""Holds the settings of a run, and compares those of two runs by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Literal

from torch import nn

from plasticnet.apps.data import Data
from plasticnet.budgets.budget import Budget
from plasticnet.cost.names import check_names
from plasticnet.errors import PlasticError
from plasticnet.training.stages import Stage

Mode = Literal["dense", "prune", "grow"]

# What --mode can be, and the runs that each choice stands for.
MODES: dict[str, tuple[Mode, ...]] = {
    "prune": ("prune",),
    "grow": ("grow",),
    "both": ("dense", "prune", "grow"),
    "dense": ("dense",),
}

# How settings are called where their own name would not be understood.
_WORDS = {
    "modes": "mode",
    "data_sha256": "content of the data (sha256)",
    "model_sha256": "structure of the model (sha256)",
}


@dataclass(frozen=True)
class Config:
    """The settings of a run: everything that decides its result except the data, the model and the mode.

    Args:
        epochs: The number of epochs of all stages together.
        k: How plastic the gates are in the middle stage.
        k_end: The k at the end of the middle stage, or None if it does not change.
        budget: What the network may cost. If it is given, it takes the place of ``penalty``, ``cost`` and ``scale``.
        penalty: The strength of the pressure on the cost, 0 or more.
        cost: The cost that is penalised.
        scale: The scale of the penalty, as in `PlasticNet.penalty`.
        estimator: How the gradient of the gates is estimated: one of `ESTIMATORS`.
        gates: Whether gates are drawn per sample or per batch.
        inputs: Name patterns of layers whose input features get gates.
        start: The number of units per site from which growth starts.
        batch: The batch size.
        lr: Adam's learning rate for the model's parameters.
        gate_lr: Adam's learning rate for the logits of the gates.
        weight_decay: Adam's weight decay for the model's parameters.
        seed: The seed of everything random.

    Raises:
        PlasticError: A number is out of range, or the cost or the scale is unknown.
    """

    epochs: int = 60
    k: float = 7.0
    k_end: float | None = None
    budget: Budget | None = None
    penalty: float = 1e-3
    cost: Literal["units", "parameters", "macs"] = "units"
    scale: Literal["linear", "log"] = "linear"
    estimator: str = "bitflip-cv"
    gates: Literal["auto", "sample", "batch"] = "auto"
    inputs: tuple[str, ...] = ()
    start: int = 3
    batch: int = 128
    lr: float = 1e-3
    gate_lr: float = 1e-2
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rates = all(0 < rate < math.inf for rate in (self.lr, self.gate_lr)) and 0 <= self.penalty < math.inf
        if min(self.epochs, self.batch, self.start) < 1 or not rates:
            raise PlasticError(
                f"epochs={self.epochs}, batch={self.batch}, start={self.start}, lr={self.lr}, gate_lr={self.gate_lr}, "
                f"penalty={self.penalty}: all must be positive (the penalty may be 0)"
            )
        check_names(self.cost, self.scale)

    def stages(self, mode: Mode) -> list[Stage]:
        """Return the stages of a run: ordinary training for 5 % of the epochs, plastic for 70 %, hardened for 25 %.

        In mode "dense" there is ordinary training only.

        Raises:
            PlasticError: There are fewer epochs than stages.
        """
        if mode == "dense":
            return [Stage(self.epochs, math.inf)]
        if self.epochs < 3:
            raise PlasticError(f"epochs={self.epochs}: the three stages need at least 3")
        first, last = max(1, round(0.05 * self.epochs)), max(1, round(0.25 * self.epochs))
        return [Stage(first, math.inf), Stage(self.epochs - first - last, self.k, self.k_end), Stage(last, math.inf)]


def plain(config: Config) -> dict[str, Any]:
    """Return the settings as they are when they have been read from a file."""
    return json.loads(json.dumps(asdict(config)))


def describe_model(model: nn.Module) -> str:
    """Return the structure of a model as text: its modules, and the names, types and shapes of its tensors.

    Addresses in memory are left out, because they differ from one process to the next.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lines = [repr(model), *(f"{name}: {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors)]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(lines))


def identity(data: Data, model: str, config: Config, mode: Mode) -> dict[str, Any]:
    """Return what must be the same when a run is resumed, as a checkpoint holds it.

    Args:
        data: The data.
        model: The structure of the model, as `describe_model` returns it.
        config: The settings.
        mode: What the run does.
    """
    return {"config": plain(config), "model": model, "mode": mode, "data_sha256": data.sha256}


def settings(
    data_name: str, data: Data, model_name: str, model: str, modes: tuple[Mode, ...], config: Config
) -> dict[str, Any]:
    """Return what must be the same when the runs of a folder are resumed, as config.json holds it.

    Args:
        data_name: The name of the data.
        data: The data.
        model_name: The name of the model.
        model: The structure of the model, as `describe_model` returns it.
        modes: What the runs do.
        config: The settings that they share.
    """
    named = {"data": data_name, "model": model_name, "modes": list(modes), **plain(config)}
    return {**named, "data_sha256": data.sha256, "model_sha256": sha256(model.encode()).hexdigest()}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a line that names every setting that is not as before: "lr: 0.003 then, 0.5 now; ...".

    Args:
        then: The settings as a file holds them. Those that ``now`` does not have are not compared.
        now: The settings of this call.
    """
    found = []
    for name, new in now.items():
        if name not in then:
            found.append(f"{_WORDS.get(name, name)}: not recorded then, {_text(name, new)} now")
        elif then[name] != new:
            old, new = _first_difference(then[name], new)
            found.append(f"{_WORDS.get(name, name)}: {_text(name, old)} then, {_text(name, new)} now")
    return "; ".join(found)


def _first_difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Return the first lines in which two texts of several lines differ; other values are returned as they are."""
    if not (isinstance(old, str) and isinstance(new, str) and "\n" in old + new):
        return old, new
    a, b = old.splitlines(), new.splitlines()
    length = max(len(a), len(b))
    rows = zip(a + [""] * (length - len(a)), b + [""] * (length - len(b)), strict=True)
    return next(((x.strip(), y.strip()) for x, y in rows if x != y), (old, new))


def _text(name: str, value: Any) -> str:
    """Return a setting in a form that fits into a line."""
    if name.endswith("sha256"):
        return str(value)[:12]
    if name == "modes":
        return {runs: mode for mode, runs in MODES.items()}.get(tuple(value or ()), str(value))
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items() if v is not None) or "none"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else " ".join(str(value).split()) or "nothing"
