"""Holds data as tensors, split for training, validation and test, and loads the data sets that have a name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from plasticnet.apps.tables import Table
from plasticnet.errors import PlasticError

DATASETS = ("digits", "moons", "mnist", "fashion")
Task = Literal["classification", "regression"]

# For images in torchvision's layout: the mean and the deviation of their pixels, and the class that reads them.
_PIXELS = {"mnist": (0.1307, 0.3081, "MNIST"), "fashion": (0.2860, 0.3530, "FashionMNIST")}


@dataclass(frozen=True)
class Split:
    """A part of a data set.

    Attributes:
        x: The inputs, shape (samples, ...).
        y: The integer labels, or the normalised targets of a regression, shape (samples,).
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Target:
    """What is to be predicted.

    Attributes:
        task: What kind of answer that is.
        name: How it is called, as a column of a table is, or None.
        labels: The names of the classes in the order of their numbers; empty where they are the numbers themselves.
        mean: In a regression, the mean of the target in the training rows, which was subtracted.
        deviation: In a regression, the standard deviation by which it was then divided.
    """

    task: Task = "classification"
    name: str | None = None
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0


@dataclass(frozen=True)
class Data:
    """A data set in three parts: for training, for validation, and for the test, which is read only at the end.

    Attributes:
        train: The part to train on.
        val: The part by which decisions are made.
        test: The part that is read at the end.
        target: What is to be predicted.
        table: How the columns of a table became inputs, or None.
    """

    train: Split
    val: Split
    test: Split
    target: Target = Target()
    table: Table | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.train.x.shape[1:])

    @property
    def task(self) -> Task:
        """What kind of answer is to be predicted."""
        return self.target.task

    @property
    def outputs(self) -> int:
        """The number of outputs that a network needs: one for each class, or a single one."""
        return 1 if self.task == "regression" else len(self.target.labels) or int(self.train.y.max()) + 1

    def to(self, device: torch.device | str) -> Data:
        """Return the data on a device."""
        train, val, test = (Split(p.x.to(device), p.y.to(device)) for p in (self.train, self.val, self.test))
        return Data(train, val, test, self.target, self.table)

    def floating(self) -> Data:
        """Return the data with inputs of floating numbers, which whole numbers become."""
        if self.train.x.is_floating_point():
            return self
        train, val, test = (Split(p.x.float(), p.y) for p in (self.train, self.val, self.test))
        return Data(train, val, test, self.target, self.table)

    @cached_property
    def sha256(self) -> str:
        """A hash of the content of all three parts: of the types, shapes and bytes of their tensors."""
        found = sha256()
        for part in (self.train, self.val, self.test):
            for tensor in (part.x, part.y):
                found.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def load_data(name: str, data_dir: str | Path | None = None, seed: int = 0) -> Data:
    """Load a data set.

    Args:
        name: "digits" (those that come with scikit-learn), "moons" (generated), "mnist" or "fashion".
        data_dir: The folder that holds MNIST or Fashion-MNIST in torchvision's layout.
        seed: The seed of the split, and of the moons.

    Raises:
        PlasticError: The name is unknown, or the folder does not hold these images.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "digits":
        return _digits(generator)
    if name == "moons":
        return moons(generator)
    if name in _PIXELS:
        return _mnist(name, data_dir, generator)
    raise PlasticError(f"unknown data {name!r}: choose one of {', '.join(DATASETS)}")


def _digits(generator: torch.Generator) -> Data:
    """Load the digits of scikit-learn as images of shape (1, 8, 8) with values from -1 to 1."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    inputs = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(y).long()
    order = torch.randperm(len(labels), generator=generator)
    train, val, test = (Split(inputs[i], labels[i]) for i in order.split([1077, 360, 360]))
    return Data(train, val, test)


def moons(generator: torch.Generator, train: int = 500, test: int = 500, noise: float = 0.1) -> Data:
    """Generate the task of the paper's authors: to tell two interlocking arcs apart.

    The arcs of 270 degrees lie in a plane and have noise on their radius. A random orthonormal basis of shape (2, 100)
    lifts them to 100 dimensions.

    Args:
        generator: The source of all random numbers.
        train: The number of samples for training and validation; a fifth of them is for validation.
        test: The number of samples for the test.
        noise: The standard deviation of the radius, which is 1 on average.
    """
    n = train + test
    labels = torch.arange(n) % 2
    angle = torch.rand(n, generator=generator) * 1.5 * math.pi
    radius = 1 + noise * torch.randn(n, generator=generator)
    arc = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    # The second arc is the first one, turned by 180 degrees about a point for which the two interlock.
    plane = torch.where(labels[:, None] == 0, arc, torch.tensor([1.0, 0.0]) - arc)
    basis = torch.linalg.qr(torch.randn(100, 2, generator=generator)).Q.T
    x = plane @ basis
    order = torch.randperm(n, generator=generator)
    fit = train - train // 5
    first, second, last = (Split(x[i], labels[i]) for i in order.split([fit, train - fit, test]))
    return Data(first, second, last)


def _mnist(name: str, data_dir: str | Path | None, generator: torch.Generator) -> Data:
    """Load MNIST or its like as images of shape (1, 28, 28), of mean 0 and variance 1 over the training data.

    The validation data are 5,000 of the training images.
    """
    from torchvision import datasets

    mean, deviation, kind = _PIXELS[name]
    if data_dir is None:
        raise PlasticError(f"{name} needs --data-dir, the folder that holds {kind}/raw (torchvision's layout)")
    try:
        train, test = (getattr(datasets, kind)(str(data_dir), train=t, download=False) for t in (True, False))
    except (RuntimeError, ValueError, OSError, EOFError, AssertionError, IndexError) as error:
        raise PlasticError(f"no {kind} in {data_dir}: {error}") from error

    def split(images: Any, labels: Any) -> Split:
        return Split(((images.float() / 255 - mean) / deviation)[:, None], labels)

    order = torch.randperm(len(train.targets), generator=generator)
    fit, val = order[5000:], order[:5000]
    return Data(
        split(train.data[fit], train.targets[fit]),
        split(train.data[val], train.targets[val]),
        split(test.data, test.targets),
    )
