"""Sums over the rows that a reader sees: enough to refit it, and to know its error for any other weights.

A reader multiplies its inputs x with a matrix. Its error e is what the network with all units open computes there,
minus what the gated network computes. The sums are those of the products of x and e with each other. Products of a few
rows are taken in the precision of the rows, but at least in single precision, and are added in double precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 8192  # so many rows are multiplied at once


class Sums:
    """Sums over rows, for each group of a reader.

    Attributes:
        n: The number of rows.
        x: The sum of the inputs, shape (groups, inputs).
        e: The sum of the errors, shape (groups, outputs).
        xx: Their products, shape (groups, inputs, inputs).
        xe: Shape (groups, inputs, outputs).
        ee: The sum of the squared errors, shape (groups, outputs).
        y: The sum of the outputs that are wanted, shape (groups, outputs).
        yy: The sum of their squares, shape (groups, outputs).
        weight: What the squared error of each output counts, shape (outputs,), or 1.
    """

    def __init__(self) -> None:
        self.n = 0
        self.weight = torch.ones((), dtype=torch.float64)
        self.x = self.e = self.xx = self.xe = self.ee = self.y = self.yy = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, wanted: Tensor, had: Tensor, scale: Tensor | None = None) -> None:
        """Add rows.

        Args:
            x: The inputs of the reader in the gated network, shape (groups, rows, inputs).
            wanted: What the network with all units open computes, shape (groups, rows, outputs).
            had: What the gated network computes.
            scale: By what each output is multiplied behind the reader, shape (outputs,), or None.
        """
        if scale is not None:
            self.weight = scale.double().square()
        for xs, ws, hs in zip(*(t.split(_CHUNK, 1) for t in (x, wanted, had)), strict=True):
            xs, ys = _at_least_single(xs), _at_least_single(ws)
            es = ys - _at_least_single(hs)
            self.n += xs.shape[1]
            self.x = self.x + xs.sum(1, dtype=torch.float64)
            self.e = self.e + es.sum(1, dtype=torch.float64)
            self.xx = added(self.xx, xs.mT @ xs)
            self.xe = added(self.xe, xs.mT @ es)
            self.ee = self.ee + es.double().square().sum(1)
            self.y = self.y + ys.sum(1, dtype=torch.float64)
            self.yy = self.yy + ys.double().square().sum(1)

    def moments(self, constant: bool) -> tuple[Tensor, Tensor]:
        """Return the mean products of inputs with inputs and with errors, around their means if there is a constant."""
        xx, xe = self.xx / self.n, self.xe / self.n
        if constant:
            mean = self.x / self.n
            xx = xx - mean[:, :, None] * mean[:, None, :]
            xe = xe - mean[:, :, None] * (self.e / self.n)[:, None, :]
        return xx, xe

    def error(self, change: Tensor | None = None, constant: Tensor | None = None) -> Tensor:
        """Return the mean squared error of each output after a change of the weights, shape (groups, outputs).

        Args:
            change: What is added to the matrices, shape (groups, inputs, outputs).
            constant: What is added to the outputs, shape (groups, outputs).
        """
        total = self.ee
        if change is not None:
            total = total - 2 * (change * self.xe).sum(1) + (change * (self.xx @ change)).sum(1)
        if constant is not None:
            linear = -2 * self.e if change is None else 2 * (self.x[:, None] @ change)[:, 0] - 2 * self.e
            total = total + constant * linear + self.n * constant.square()
        return total / self.n

    def variance(self) -> Tensor:
        """Return the variance of the wanted outputs, shape (groups, outputs)."""
        return (self.yy / self.n - (self.y / self.n).square()).clamp(min=0)


def added(total: Tensor, products: Tensor) -> Tensor:
    """Return a total in double precision with products added to it, in place where it has their shape."""
    return total.add_(products) if total.shape == products.shape else total + products.double()


def _at_least_single(t: Tensor) -> Tensor:
    """Return a tensor in single precision, or in double precision if that is what it has."""
    return t if t.dtype == torch.float64 else t.float()
