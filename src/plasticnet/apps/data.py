"""Data sets of the command line, as tensors: train, validation and test."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plasticnet.errors import PlasticError

DATASETS = ("digits", "moons", "mnist")


@dataclass(frozen=True)
class Split:
    """Inputs (samples, ...) and integer labels (samples,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """The three splits; training never sees ``test``."""

    train: Split
    val: Split
    test: Split

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.train.x.shape[1:])

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train.y.max()) + 1


def load_data(name: str, data_dir: str | Path | None = None, seed: int = 0) -> Data:
    """``digits`` (scikit-learn's, embedded), ``moons`` (generated) or ``mnist`` (from ``data_dir``, in
    torchvision's layout). ``seed`` makes the split, and the moons.

    Raises `PlasticError` for another name, or when MNIST is not there.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "digits":
        return _digits(generator)
    if name == "moons":
        return moons(generator)
    if name == "mnist":
        return _mnist(data_dir, generator)
    raise PlasticError(f"unknown data {name!r}: choose one of {', '.join(DATASETS)}")


def _digits(generator: torch.Generator) -> Data:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    inputs = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(y).long()
    order = torch.randperm(len(labels), generator=generator)
    parts = [Split(inputs[i], labels[i]) for i in order.split([1077, 360, 360])]
    return Data(*parts)


def moons(generator: torch.Generator, train: int = 500, test: int = 500, noise: float = 0.1) -> Data:
    """The authors' task: two interlocking arcs of 270 degrees in the plane, with noise on the radius,
    lifted to 100 dimensions by a random orthonormal 2 x 100 basis. A fifth of ``train`` validates."""
    n = train + test
    labels = torch.arange(n) % 2
    angle = torch.rand(n, generator=generator) * 1.5 * math.pi
    radius = 1 + noise * torch.randn(n, generator=generator)
    arc = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    # The second arc is the first one turned half around, about a point that makes the two interlock.
    plane = torch.where(labels[:, None] == 0, arc, torch.tensor([1.0, 0.0]) - arc)
    basis = torch.linalg.qr(torch.randn(100, 2, generator=generator)).Q.T
    x = plane @ basis
    order = torch.randperm(n, generator=generator)
    fit = train - train // 5
    parts = order.split([fit, train - fit, test])
    return Data(*[Split(x[i], labels[i]) for i in parts])


def _mnist(data_dir: str | Path | None, generator: torch.Generator) -> Data:
    from torchvision.datasets import MNIST

    if data_dir is None:
        raise PlasticError("mnist needs --data-dir, the folder that holds MNIST/raw (torchvision's layout)")
    try:
        train, test = (MNIST(str(data_dir), train=t, download=False) for t in (True, False))
    except (RuntimeError, ValueError, OSError, EOFError, AssertionError, IndexError) as error:
        raise PlasticError(f"no MNIST in {data_dir}: {error}") from error

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split(((images.float() / 255 - 0.1307) / 0.3081)[:, None], labels)

    order = torch.randperm(len(train.targets), generator=generator)
    fit, val = order[5000:], order[:5000]
    return Data(
        split(train.data[fit], train.targets[fit]),
        split(train.data[val], train.targets[val]),
        split(test.data, test.targets),
    )
