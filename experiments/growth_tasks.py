"""The data sets and networks on which growing is compared with pruning, for growth_price.py and others."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import ResNet
from cifar import images as pictures
from torch import Tensor, nn

from plasticnet.apps.data import load_data
from plasticnet.apps.models import MLP, LeNet5

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A data set, a network that is wider than it needs to be, and how it is trained.

    Attributes:
        parts: Inputs and targets to train on, to validate, and to test.
        model: Makes the wide network.
        losses: The losses of the samples, from outputs and targets.
        error: What is reported, from outputs and targets: percent wrong, or the mean squared error.
        price: The price of a parameter.
        epochs: All epochs; the last fifth of them is hardened.
        batch: The size of a batch.
        rate: The learning rate of the weights.
    """

    parts: tuple[Part, Part, Part]
    model: Callable[[], nn.Module]
    losses: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    price: float
    epochs: int
    batch: int
    rate: float


def classes(outputs: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each sample."""
    return F.cross_entropy(outputs, y, reduction="none")


def wrong(outputs: Tensor, y: Tensor) -> Tensor:
    """The share of wrong answers, in percent."""
    return 100 * outputs.argmax(1).ne(y).float().mean()


def squares(outputs: Tensor, y: Tensor) -> Tensor:
    """The squared error of each sample."""
    return (outputs[:, 0] - y).square()


def mean_square(outputs: Tensor, y: Tensor) -> Tensor:
    """The mean squared error."""
    return squares(outputs, y).mean()


def divided(x: Tensor, y: Tensor, train: int, seed: int = 0) -> tuple[Part, Part, Part]:
    """Rows at random: so many to train on, and half of the rest each to validate and to test; columns normalised."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:train], order[train:]
    middle = len(rest) // 2
    mean, deviation = x[first].mean(0), x[first].std(0).clamp(min=1e-6)
    x = (x - mean) / deviation
    return (x[first], y[first]), (x[rest[:middle]], y[rest[:middle]]), (x[rest[middle:]], y[rest[middle:]])


def one_hot(rows: list[list[str]], numbers: set[int]) -> Tensor:
    """Columns of a table as numbers, and all other columns as one column for each value."""
    columns = []
    for i in range(len(rows[0])):
        values = [row[i].strip() for row in rows]
        if i in numbers:
            columns.append(torch.tensor([[float(v or "nan")] for v in values]).nan_to_num(0.0))
        else:
            kinds = sorted(set(values))
            columns.append(F.one_hot(torch.tensor([kinds.index(v) for v in values]), len(kinds)).float())
    return torch.cat(columns, 1)


def adult(folder: Path) -> tuple[Part, Part, Part]:
    """Adult: whether somebody earns more than 50,000."""
    rows = [r for r in csv.reader((folder / "tabular" / "adult.data").open()) if len(r) == 15]
    y = torch.tensor([int(">50K" in r[14]) for r in rows])
    return divided(one_hot([r[:14] for r in rows], {0, 2, 4, 10, 11, 12}), y, 20_000)


def housing(folder: Path) -> tuple[Part, Part, Part]:
    """California housing: the logarithm of the median value, normalised."""
    rows = list(csv.reader((folder / "tabular" / "california_housing.csv").open()))[1:]
    y = torch.tensor([float(r[8]) for r in rows]).log()
    return divided(one_hot([[*r[:8], r[9]] for r in rows], set(range(8))), (y - y.mean()) / y.std(), 14_000)


def images(folder: Path) -> tuple[Part, Part, Part]:
    """The first 10,000 images of MNIST to train on, 5,000 others to validate, and the test set."""
    data = load_data("mnist", folder)
    train, val, test = ((p.x, p.y) for p in (data.train, data.val, data.test))
    return (train[0][:10_000], train[1][:10_000]), val, test


def cifar(folder: Path) -> tuple[Part, Part, Part]:
    """The first 10,000 images of CIFAR-10 to train on, the next 5,000 to validate, and the test set."""
    (x, y), test = (pictures(folder, part, n) for part, n in (("train", 15_000), ("test", 10_000)))
    return (x[:10_000], y[:10_000]), (x[10_000:], y[10_000:]), test


def fashion(folder: Path) -> tuple[Part, Part, Part]:
    """The first 10,000 images of Fashion-MNIST to train on, the next 5,000 to validate, and the test set."""
    from torchvision.datasets import FashionMNIST

    train, test = (FashionMNIST(str(folder), train=t) for t in (True, False))
    mean, deviation = (f(train.data[:10_000].float()) for f in (torch.mean, torch.std))
    x, x_test = ((images.float() - mean) / deviation for images in (train.data, test.data))
    y, y_test = train.targets, test.targets
    return (x[:10_000], y[:10_000]), (x[10_000:15_000], y[10_000:15_000]), (x_test, y_test)


def task(name: str, folder: Path | None) -> Task:
    """One of the tasks; all but the digits need the folder that holds the data."""
    if name == "digits":
        data = load_data("digits")
        parts = tuple((p.x, p.y) for p in (data.train, data.val, data.test))
        return Task(parts, lambda: MLP([64, 256, 128, 10]), classes, wrong, 2e-5, 60, 32, 3e-3)
    if folder is None:
        raise SystemExit(f"{name}: give --data-dir")
    if name == "adult":
        parts = adult(folder)
        n = parts[0][0].shape[1]
        return Task(parts, lambda: MLP([n, 256, 128, 2]), classes, wrong, 2e-6, 30, 128, 1e-3)
    if name == "housing":
        parts = housing(folder)
        n = parts[0][0].shape[1]
        return Task(parts, lambda: MLP([n, 256, 128, 1]), squares, mean_square, 5e-6, 60, 128, 3e-3)
    if name == "MNIST":
        return Task(images(folder), LeNet5, classes, wrong, 1e-6, 30, 64, 1e-3)
    if name == "Fashion-MNIST":
        x, y = zip(*fashion(folder), strict=True)
        parts = tuple(zip((i.view(-1, 1, 28, 28) for i in x), y, strict=True))
        return Task(parts, LeNet5, classes, wrong, 1e-6, 30, 64, 1e-3)
    if name == "CIFAR-10":
        return Task(cifar(folder), ResNet, classes, wrong, 5e-7, 20, 128, 2e-3)
    if name == "fashion":
        return Task(fashion(folder), lambda: MLP([784, 256, 128, 10]), classes, wrong, 1e-6, 20, 64, 1e-3)
    raise SystemExit(f"unknown task {name}")
