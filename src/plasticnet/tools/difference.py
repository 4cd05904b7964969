"""How far the outputs of two models are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-300  # what a difference is divided by where all that was expected is 0


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to the largest finite entry of each expected one.

    NaN at the same place in both and equal infinities count as equal. Differences of single and double precision are
    taken in their own precision, all others (of half precision, integers, complex numbers) in double.

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
    """The tensor itself if it is of single or double precision, so that nothing is copied; else in double."""
    if t.dtype in (torch.float32, torch.float64):
        return t
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _apart(expected: Tensor, found: Tensor) -> float:
    difference = _largest(expected - found)
    if not math.isfinite(difference):  # something is not finite, or the subtraction has overflowed
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
    """The real and imaginary parts of complex numbers: each may be infinite or NaN by itself."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _largest(t: Tensor) -> float:
    return t.abs().max().item()
