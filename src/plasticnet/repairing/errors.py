"""Compares the outputs of two networks on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Sums:
    """Sums over the inputs for one tensor of the output.

    Attributes:
        n: The number of entries along the batch.
        entries: The number of all entries.
        total: The sum over the batch, in the shape of one sample; where the samples differ in shape, a single number.
        squares: The sum of all squares.
        errors: The sum of all squared errors.
    """

    n: int = 0
    entries: int = 0
    total: Tensor | None = None
    squares: float = 0.0
    errors: float = 0.0


class OutputErrors:
    """The squared errors of outputs, as a share of the variance of each output over the inputs."""

    def __init__(self) -> None:
        self._sums: list[_Sums] = []

    def add(self, wanted: Iterable[Tensor], had: Iterable[Tensor]) -> None:
        """Add the outputs of a batch."""
        for i, (y, z) in enumerate(zip(wanted, had, strict=True)):
            if i == len(self._sums):
                self._sums.append(_Sums())
            sums, y, z = self._sums[i], y.double(), z.double()
            total = y.sum(0)
            if sums.total is not None and sums.total.shape != total.shape:
                total, sums.total = total.sum(), sums.total.sum()
            sums.total = total if sums.total is None else sums.total + total
            sums.n, sums.entries = sums.n + len(y), sums.entries + y.numel()
            sums.squares += y.square().sum().item()
            sums.errors += (y - z).square().sum().item()

    @property
    def share(self) -> float:
        """The mean over the outputs of squared error over variance; 0 where there is no error."""
        shares = list[float]()
        for s in self._sums:
            assert s.total is not None
            means = s.total.square().sum().item() / (s.n if s.total.dim() or s.entries == s.n else s.entries)
            variance = max(s.squares - means, torch.finfo(torch.float32).tiny)
            shares.append(s.errors / variance)
        return sum(shares) / len(shares)
