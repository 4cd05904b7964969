"""Refits a reader by ridge regression, with the strongest ridge that does well on inputs held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plasticnet.repairing.sums import Sums

# The strengths, as shares of the mean square of the inputs. Sums in single precision are no more exact than the first.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_IN_DOUBLE = (1e-10, 1e-8)
# A weaker ridge must make the error on inputs held out smaller by this share. Weights that move less do less harm on
# inputs unlike those that were read; this is the rule of one standard error, with a share in the place of that error.
GAIN = 0.02


@dataclass(frozen=True, eq=False)
class Fit:
    """The best change of a reader's weights.

    Attributes:
        change: What is added to the matrices, shape (groups, inputs, outputs).
        constant: What is added to the outputs, shape (groups, outputs), or None.
        strength: The strength of the ridge.
        error: The mean squared error of each output on inputs held out, shape (groups, outputs).
    """

    change: Tensor
    constant: Tensor | None
    strength: float
    error: Tensor


def refit(
    fitted: Sums, held: Sums, *, constant: bool, double: bool, valid: Tensor | None, counts: Tensor
) -> Fit | None:
    """Return the change of the weights that makes the error small, or None where no change makes it smaller.

    The strongest ridge is taken that does well: a weaker one must make the error smaller by a share of `GAIN`. The
    ridge pulls towards the present weights.

    Args:
        fitted: The sums over the inputs to fit.
        held: The sums over the inputs held out.
        constant: Whether a constant may be added to the outputs.
        double: Whether the inputs are in double precision.
        valid: Which inputs may be used, shape (groups, inputs); None for all.
        counts: What the squared error of each output counts, shape (groups, outputs).
    """
    xx, xe = fitted.moments(constant)
    if valid is not None:
        keep = valid.to(xx.dtype)
        xx, xe = xx * keep[:, :, None] * keep[:, None, :], xe * keep[:, :, None]
    best: Fit | None = None
    least = float((held.error() * counts).sum())
    for strength in reversed((*_IN_DOUBLE, *STRENGTHS) if double else STRENGTHS):
        change = _solved(xx, xe, strength)
        if change is None:
            continue
        shift = (fitted.e / fitted.n - (fitted.x[:, None] / fitted.n @ change)[:, 0]) if constant else None
        error = held.error(change, shift)
        total = float((error * counts).sum())
        if total < (least if best is None else (1 - GAIN) * least):
            best, least = Fit(change, shift, strength, error), total
    return best


def _solved(xx: Tensor, xe: Tensor, strength: float) -> Tensor | None:
    """Return the solution of ``(xx + ridge) change = xe``, or None where the matrix is not positive definite."""
    diagonal = xx.diagonal(dim1=1, dim2=2)
    used = diagonal > 0
    ridge = strength * diagonal.sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)
    ridge = torch.where(used, ridge, 1.0)  # an input that is always 0, or not used, stays as it is
    matrix = xx.clone()
    matrix.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, info = torch.linalg.cholesky_ex(matrix)
    del matrix  # because memory for another one is wanted below
    return None if bool(info.any()) else torch.cholesky_solve(xe, factor)
