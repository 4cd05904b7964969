"""Holds the settings of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from plasticnet.apps.bounds import check_count, check_seed
from plasticnet.apps.models import START, chooses
from plasticnet.apps.own_data import Reading
from plasticnet.apps.parsing import is_unicode, parse
from plasticnet.budgets.budget import Budget
from plasticnet.cost.names import check_names
from plasticnet.errors import PlasticError
from plasticnet.training.stages import Stage

Mode = Literal["dense", "prune", "grow"]

# What a run can do, and the networks that it trains for that.
MODES: dict[str, tuple[Mode, ...]] = {
    "prune": ("prune",),
    "grow": ("grow",),
    "dense": ("dense",),
    "compare": ("dense", "prune", "grow"),
}

DEVICES = ("cpu", "cuda", "mps", "auto")

# How many rows a batch has and how often the data are read if nobody says: `usual_batch` and `usual_epochs`.
_BATCHES, _SMALLEST, _LARGEST = 32, 32, 256
_EPOCHS, _MOST, _FEWEST, _SMALL, _LARGE = 60, 200, 20, 1000, 30_000


@dataclass(frozen=True)
class Config:
    """The settings of training: everything that decides a result except the data, the model, the mode and the device.

    Args:
        epochs: The number of epochs of all stages together.
        k: How plastic the gates are in the middle stage.
        k_end: The k at the end of the middle stage, or None if it does not change.
        budget: What the network may cost. If it is given, it takes the place of ``price`` and ``cost``.
        price: What one parameter (or what ``cost`` names) costs, 0 or more: so many nats of the summed log-likelihood
            of all training rows.
        cost: The cost that has the price.
        estimator: How the gradient of the gates is estimated: one of `ESTIMATORS`.
        gates: Whether gates are drawn per sample or per batch.
        inputs: Name patterns of layers whose input features get gates.
        start: The number of units per site from which growth starts.
        batch: The batch size.
        lr: Adam's learning rate for the model's parameters, which falls to 0 over the last quarter of the epochs.
        gate_lr: Adam's learning rate for the logits of the gates.
        weight_decay: Adam's weight decay for the model's parameters.
        seed: The seed of everything random.

    Raises:
        PlasticError: A number is out of range, or the cost is unknown.
    """

    epochs: int = 60
    k: float = 7.0
    k_end: float | None = None
    budget: Budget | None = None
    price: float = 0.05
    cost: Literal["units", "parameters", "macs"] = "parameters"
    estimator: str = "bitflip-cv"
    gates: Literal["auto", "sample", "batch"] = "auto"
    inputs: tuple[str, ...] = ()
    start: int = START
    batch: int = 128
    lr: float = 1e-3
    gate_lr: float = 1e-2
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "start"):
            check_count(f"{name}={getattr(self, name)}", getattr(self, name))
        check_seed(f"seed={self.seed}", self.seed)
        for name in ("lr", "gate_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise PlasticError(f"{name}={getattr(self, name)}: it must be a number above 0")
        if not 0 <= self.price < math.inf:
            raise PlasticError(f"price={self.price}: it must be a number, 0 or more")
        check_names(self.cost, "linear")

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
        first, last = max(1, round(0.05 * self.epochs)), self._last
        return [Stage(first, math.inf), Stage(self.epochs - first - last, self.k, self.k_end), Stage(last, math.inf)]

    def rate(self, epoch: int) -> float:
        """Return the learning rate of the model's parameters in an epoch, counted from 0, in all modes alike."""
        return self.lr * min(1.0, (self.epochs - epoch) / self._last)

    @property
    def _last(self) -> int:
        """The number of epochs in which the network is hardened."""
        return max(1, round(0.25 * self.epochs))


@dataclass(frozen=True)
class Run:
    """Everything that says what the command train does, as run.json holds it.

    Args:
        data: Where the data are.
        reading: How they are read.
        model: The name of the model.
        mode: What is trained: "prune", "grow", "dense", or "compare", which trains all three.
        device: Where: "cpu", "cuda" or "mps".
        config: The settings of training.

    Raises:
        PlasticError: The mode or the device is unknown, or the mode or the budget needs a model with widths.
    """

    data: str
    reading: Reading
    model: str
    mode: Literal["prune", "grow", "dense", "compare"]
    device: Literal["cpu", "cuda", "mps"]
    config: Config

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PlasticError(f"mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if not is_unicode(self.data):
            raise PlasticError(f"--data {self.data}: the name is not UTF-8, so that run.json cannot hold it: rename it")
        if chooses(self.model) and self.mode != "grow":
            raise PlasticError(
                f"--model {self.model} has no widths to begin with, so that it can only grow: leave out --{self.mode}, "
                f"or give widths, as in {self.model}:256-128"
            )
        if chooses(self.model) and (shares := _shares(self.config.budget)):
            raise PlasticError(
                f"--budget {', '.join(shares)}: a share is one of the network that --model gives, and {self.model} has "
                f"no widths to begin with: give a number above 1, or widths, as in {self.model}:256-128"
            )

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The networks that are trained."""
        return MODES[self.mode]

    @property
    def built(self) -> str:
        """The name of the model that is built, which has widths."""
        return f"{self.model}:{self.config.start}-{self.config.start}" if chooses(self.model) else self.model

    @property
    def limited(self) -> bool:
        """Whether a network that grows keeps to the widths of the model."""
        return not chooses(self.model)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, as they are when they have been read from a file."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: Any) -> Run:
        """Return the settings that plain data hold.

        Raises:
            PlasticError: A field is unknown or missing, or has a wrong type or value; the message names it.
        """
        return parse(cls, content)


def _shares(budget: Budget | None) -> list[str]:
    """Return the targets of a budget that are shares, as text."""
    targets = {} if budget is None else {"macs": budget.macs, "params": budget.params, "units": budget.units}
    return [f"{name}={value:g}" for name, value in targets.items() if value is not None and value <= 1]


def flat(run: Run) -> dict[str, Any]:
    """Return the settings of a run side by side, as plain data."""
    whole = run.as_dict()
    return {"data": whole["data"], **whole["reading"], **{n: whole[n] for n in ("model", "mode", "device")}} | whole[
        "config"
    ]


def usual_batch(rows: int) -> int:
    """Return how many rows a batch has if nobody says: a 32nd of the training rows, but from 32 to 256."""
    return min(max(rows // _BATCHES, _SMALLEST), _LARGEST)


def usual_epochs(rows: int) -> int:
    """Return how many epochs there are if nobody says.

    There are 60; fewer where there are more than 30,000 training rows, but 20 at least; and more where there are fewer
    than 1,000, but 200 at most.
    """
    if rows < _SMALL:
        return min(-(-_EPOCHS * _SMALL // rows), _MOST)
    return max(min(_EPOCHS * _LARGE // rows, _EPOCHS), _FEWEST)


def device_of(name: str) -> Literal["cpu", "cuda", "mps"]:
    """Return the device that a name stands for; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        PlasticError: The name is unknown, or the machine has no such device.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if name == "cpu" or name == "cuda" or name == "mps":
        if there[name]:
            return name
        raise PlasticError(f"--device {name}: torch finds no such device here, only {_named(there)}")
    raise PlasticError(f"--device {name}: choose one of {', '.join(DEVICES)}")


def _named(there: Mapping[str, bool]) -> str:
    """Return the names of the devices that are there."""
    return ", ".join(name for name, is_there in there.items() if is_there)
