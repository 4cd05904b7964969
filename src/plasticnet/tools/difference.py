"""Measures how far the outputs of two models are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-300  # the divisor of a difference where all expected entries are 0


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest relative difference between two lists of tensors.

    The difference between two tensors is relative to the largest finite entry of the expected one. NaN in the same
    place of both counts as equal, and so do equal infinities. Differences are computed in single or double precision if
    the tensors have it, and else in double precision.

    Args:
        expected: The tensors to compare with.
        found: The tensors to compare.

    Returns:
        A number from 0 on, never NaN. It is infinite where the lists or the shapes differ, and where one tensor has a
        NaN or an infinity and the other has something else.

    Example:
        >>> relative_difference([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -3.0])])
        0.25
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return math.inf
    pairs = zip(expected, found, strict=True)
    return max((_apart(_exact(a), _exact(b)) for a, b in pairs if a.numel()), default=0.0)


def _exact(t: Tensor) -> Tensor:
    """Return a tensor in double precision, or the tensor itself where it has single precision, to save a copy."""
    if t.dtype in (torch.float32, torch.float64):
        return t
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _apart(expected: Tensor, found: Tensor) -> float:
    """Return the relative difference of two tensors, as in `relative_difference`."""
    difference = _largest(expected - found)
    if not math.isfinite(difference):  # An entry is not finite, or the subtraction has overflowed.
        common = torch.promote_types(torch.promote_types(expected.dtype, found.dtype), torch.float64)
        a, b = _parts(expected.to(common)), _parts(found.to(common))
        finite = a.isfinite()
        if not ((a == b) | (a.isnan() & b.isnan()) | (finite & b.isfinite())).all():
            return math.inf
        a, b = a.where(finite, 0), b.where(finite, 0)
        expected, found = (torch.view_as_complex(t) if common.is_complex else t for t in (a, b))
        difference = _largest(expected - found)
    return difference / max(_largest(expected), _SMALLEST)


def _parts(t: Tensor) -> Tensor:
    """Return the real and imaginary parts of complex numbers, since each may be infinite or NaN on its own."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _largest(t: Tensor) -> float:
    """Return the largest absolute value."""
    return t.abs().max().item()
