"""The tasks, networks and data on which ways to a smaller network are compared, for peers.py.

All have at most 20,000 rows to train on, so that one run takes a minute or two on one core. The networks name the
modules after which their units can be multiplied (`Task.points`), which some of the ways need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from growth_tasks import adult, fashion, housing, images, squares
from peers_series import Lstm, temperatures
from torch import Tensor, nn
from transformers_cut import CHARACTERS, CONTEXT, LENGTH, PADDING, WORDS, characters, sentences

import plasticnet as pn
from plasticnet.apps.models import MLP

Part = tuple[Tensor, Tensor]
TEMPERATURE, TEACHER = 2.0, 0.7  # of the distillation, and the weight of the teacher in it


@dataclass(frozen=True)
class Task:
    """A data set, a network that is wider than it needs to be, and how it is trained.

    Attributes:
        parts: Inputs and targets to train on, to validate, and to test.
        build: Makes the wide network.
        points: For each site of plasticnet, the module whose output carries its units, and along which axis.
        spared: The modules that Torch-Pruning must leave alone, because they carry what is no hidden unit.
        shares: The budgets: shares of the multiply-adds.
        dense: The epochs of the wide network.
        epochs: The epochs that every way has after that, or, from random weights, beside these.
        batch: The size of a batch.
        rate: The largest learning rate of the dense training.
        rows: How many inputs an epoch reads, where these are not all.
        measure: What is reported.
        context: Whether an output has a prediction for every position.
    """

    parts: tuple[Part, Part, Part]
    build: Callable[[], nn.Module]
    points: Mapping[str, tuple[str, int]]
    spared: tuple[str, ...]
    shares: tuple[float, ...]
    dense: int
    epochs: int
    batch: int
    rate: float
    rows: int | None = None
    measure: str = "percent wrong"

    def losses(self, output: Tensor, y: Tensor) -> Tensor:
        """The losses of samples, shape (batch,)."""
        if y.is_floating_point():
            return squares(output, y)
        return F.cross_entropy(output.movedim(-1, 1), y, reduction="none").reshape(len(y), -1).mean(1)

    def taught(self, output: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """The losses of samples that learn from the wide network's outputs, too."""
        if y.is_floating_point():
            return (1 - TEACHER) * squares(output, y) + TEACHER * squares(output, teacher[:, 0])
        found = pn.distillation(
            output.flatten(0, -2), teacher.flatten(0, -2), y.flatten(), temperature=TEMPERATURE, weight=TEACHER
        )
        return found.reshape(len(y), -1).mean(1)

    @torch.no_grad()
    def error(self, network: nn.Module, part: Part) -> float:
        """What is reported of a network on some data: percent wrong, the mean squared error, or the perplexity."""
        network.eval()
        total = 0.0
        for x, y in zip(part[0].split(500), part[1].split(500), strict=True):
            output = network(x)
            if self.measure == "percent wrong":
                total += 100 * float(output.argmax(-1).ne(y).sum())
            else:
                total += float(self.losses(output, y).double().sum())
        mean = total / len(part[0])
        return math.exp(mean) if self.measure == "perplexity" else mean


class LeNet(nn.Module):
    """LeNet-5-Caffe with 20-50-500 units and a module for each activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)
        self.act1, self.act2, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        x = self.act1(F.max_pool2d(self.conv1(x), 2))
        x = self.act2(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        return self.fc2(self.act3(self.fc1(x)))


class Block(nn.Module):
    """A block of a transformer that reads its number of heads off the weights.

    Args:
        features: The width of the residual stream.
        heads: The number of heads.
        causal: Whether a position only sees those before it.
        dropout: The rate of dropout.
    """

    def __init__(self, features: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.size, self.causal, self.dropout = features // heads, causal, dropout
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.q, self.k, self.v = (nn.Linear(features, features) for _ in range(3))
        self.o = nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)
        self.heads, self.act = nn.Identity(), nn.GELU()

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(batch, positions, features) to the same; ``hidden`` positions, (batch, positions), are not looked at."""
        n, length = x.shape[:2]
        y = self.norm1(x)
        q, k, v = (layer(y).view(n, length, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = q @ k.transpose(2, 3) / math.sqrt(self.size)
        weights = weights.masked_fill(hidden[:, None, None], -1e4)
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            weights = weights.masked_fill(later, -1e4)
        seen = self.heads(weights.softmax(3) @ v).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.o(seen), self.dropout, self.training)
        return x + F.dropout(self.down(self.act(self.up(self.norm2(x)))), self.dropout, self.training)


class Transformer(nn.Module):
    """A small transformer: of sentences into classes, or of characters into the next ones.

    Args:
        words: The size of the vocabulary.
        length: The largest number of positions.
        features: The width.
        layers: The number of blocks.
        outputs: The number of classes.
        causal: Whether every position predicts, and only sees those before it.
        dropout: The rate of dropout.
    """

    def __init__(
        self, words: int, length: int, features: int, layers: int, outputs: int, causal: bool, dropout: float
    ) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout
        self.words, self.positions = nn.Embedding(words, features), nn.Embedding(length, features)
        self.blocks = nn.ModuleList(Block(features, 4, causal, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, positions) to (batch, outputs), or (batch, positions, outputs) where it is causal."""
        hidden = torch.zeros_like(x, dtype=torch.bool) if self.causal else x.eq(PADDING)
        y = self.words(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        y = F.dropout(y, self.dropout, self.training)
        for block in self.blocks:
            y = block(y, hidden)
        y = self.norm(y)
        if not self.causal:
            seen = (~hidden)[:, :, None].to(y.dtype)
            y = (y * seen).sum(1) / seen.sum(1).clamp(min=1)
        return self.head(y)


def _mlp(part: Part, outputs: int) -> Callable[[], nn.Module]:
    widths = [part[0].shape[1], 256, 128, outputs]
    return lambda: MLP(widths)


def _transformer(layers: int) -> dict[str, tuple[str, int]]:
    points: dict[str, tuple[str, int]] = {}
    for i in range(layers):
        points |= {f"blocks.{i}.q": (f"blocks.{i}.heads", 1), f"blocks.{i}.up": (f"blocks.{i}.act", 2)}
    return points


MLP_POINTS = {"1": ("2", 1), "3": ("4", 1)}
LENET_POINTS = {"conv1": ("act1", 1), "conv2": ("act2", 1), "fc1": ("act3", 1)}
NARROW = (0.5, 0.25, 0.1, 0.05)
STREAM = ("words", "positions", "head")


def _adult(folder: Path) -> Task:
    parts = adult(folder)
    return Task(parts, _mlp(parts[0], 2), MLP_POINTS, ("5",), (0.25, 0.1, 0.03, 0.01), 10, 10, 128, 1e-3)


def _housing(folder: Path) -> Task:
    parts = housing(folder)
    task = Task(parts, _mlp(parts[0], 1), MLP_POINTS, ("5",), NARROW, 30, 30, 128, 3e-3)
    return replace(task, measure="mean squared error")


def _mnist(folder: Path) -> Task:
    return Task(images(folder), LeNet, LENET_POINTS, ("fc2",), NARROW, 15, 15, 128, 2e-3)


def _fashion(folder: Path) -> Task:
    x, y = zip(*fashion(folder), strict=True)
    parts = tuple(zip((i.view(-1, 1, 28, 28) for i in x), y, strict=True))
    return Task(parts, LeNet, LENET_POINTS, ("fc2",), NARROW, 15, 15, 128, 2e-3)


def _sentences(folder: Path) -> Task:
    found, held_out = sentences(folder), sentences(folder, "dev")
    parts = (found.x, found.y), (held_out.test_x, held_out.test_y), (found.test_x, found.test_y)
    build = lambda: Transformer(WORDS, LENGTH, 64, 2, 2, False, 0.3)  # noqa: E731
    return Task(parts, build, _transformer(2), STREAM, (0.6, 0.4, 0.25, 0.15), 8, 8, 64, 3e-3)


def _shakespeare(folder: Path) -> Task:
    found, held_out = characters(folder), characters(folder, (0.9, 0.95))
    parts = (found.x, found.y), (held_out.test_x, held_out.test_y), (found.test_x, found.test_y)
    build = lambda: Transformer(CHARACTERS, CONTEXT, 64, 2, CHARACTERS, True, 0.0)  # noqa: E731
    task = Task(parts, build, _transformer(2), STREAM, (0.6, 0.4, 0.25, 0.15), 12, 12, 32, 3e-3)
    return replace(task, rows=3200, measure="perplexity")


def _series(folder: Path) -> Task:
    points = {"first": ("act1", 2), "x": ("state", 1), "up": ("act2", 1)}
    build = lambda: Lstm(7, 48, 48, 96)  # noqa: E731
    task = Task(temperatures(folder), build, points, ("out",), NARROW, 10, 10, 64, 2e-3)
    return replace(task, rows=3200, measure="mean squared error")


TASKS: dict[str, Callable[[Path], Task]] = {
    "MNIST": _mnist,
    "Fashion-MNIST": _fashion,
    "housing": _housing,
    "Adult": _adult,
    "SST-2": _sentences,
    "Shakespeare": _shakespeare,
    "ETTh1": _series,
}
