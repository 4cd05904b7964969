"""Says how good a network is on data: by the accuracy of a classification, or the R² of a regression."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet.apps.data import Split, Task
from plasticnet.errors import PlasticError

SCORES: dict[Task, str] = {"classification": "accuracy", "regression": "R²"}


class Score(NamedTuple):
    """How good a network is on some data.

    Attributes:
        loss: The mean cross-entropy, or half of the mean squared error of the normalised target.
        score: The accuracy, or R²: the share of the target's variance that is explained.
    """

    loss: float
    score: float

    @property
    def error(self) -> float:
        """In a regression, the root of the mean squared error, in deviations of the target."""
        return math.sqrt(2 * self.loss)


def losses(output: Tensor, y: Tensor, task: Task) -> Tensor:
    """Return the loss of each sample, shape (batch,): the cross-entropy, or half of the squared error.

    Args:
        output: What the network returns: logits, shape (batch, classes), or a number each, shape (batch, 1).
        y: The labels, or the normalised target, shape (batch,).
        task: What kind of answer it is.

    Raises:
        PlasticError: The output is something else.
    """
    if not isinstance(output, Tensor):
        raise PlasticError(
            f"the model returns a {type(output).__name__}, and a tensor of outputs is needed; a PACKAGE:FACTORY can "
            "wrap the model so that it returns one"
        )
    if task == "classification":
        return F.cross_entropy(output, y, reduction="none")
    return (output.reshape(y.shape) - y).square() / 2


@torch.no_grad()
def evaluate(module: nn.Module, split: Split, task: Task = "classification", batch: int = 1000) -> Score:
    """Return the mean loss of a module and its score. The module is left in evaluation mode.

    Args:
        module: A network or a plain module that returns logits, shape (batch, classes), or numbers, shape (batch, 1).
        split: The data.
        task: What kind of answer it is.
        batch: The batch size.
    """
    module.eval()
    loss = right = 0.0
    for x, y in zip(split.x.split(batch), split.y.split(batch), strict=True):
        output = module(x)
        loss += losses(output, y, task).sum().item()
        right += (output.argmax(1) == y).sum().item() if task == "classification" else 0
    if task == "classification":
        return Score(loss / len(split), right / len(split))
    spread = (split.y - split.y.mean()).square().sum().item()
    explained = 1 - 2 * loss / spread if spread else float(loss == 0)
    return Score(loss / len(split), explained)


def shown(score: float, task: Task | str) -> str:
    """Return a score as text: an accuracy in percent, or R²."""
    return f"R² {score:.4f}" if task == "regression" else f"{100 * score:.2f} %"
