"""Keeps the library's own arithmetic in the precision of its tensors, whatever autocast the user has switched on.

A training step may run under autocast as a whole, and so may its backward pass. The model is meant to be cast, but
costs and estimates are not: in half precision, multiply-adds are infinite from 65,520 on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

HALF = frozenset({torch.float16, torch.bfloat16})


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Switch autocast off within this context.

    Args:
        device_type: The type of the device on which the context computes, such as "cuda"; "meta" has no autocast.
    """
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield


def widened(t: Tensor) -> Tensor:
    """Return a tensor in single precision, or in its own precision where that is higher."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix @ vector``, for which autocast is off in the backward pass, too.

    Args:
        matrix: A tensor of one dimension or more, shape (..., n).
        vector: Shape (n,).

    Returns:
        Shape (...).
    """
    found = _Product.apply(matrix, vector)
    assert isinstance(found, Tensor)
    return found


class _Product(torch.autograd.Function):
    """Multiplies a tensor and a vector, without autocast in either pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, vector: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(matrix, vector)
        with full_precision(vector.device.type):
            return matrix @ vector

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        matrix, vector = ctx.saved_tensors
        with full_precision(vector.device.type):
            by_row = matrix.reshape(-1, len(vector)).t()
            return (
                grad[..., None] * vector if ctx.needs_input_grad[0] else None,
                by_row @ grad.reshape(-1) if ctx.needs_input_grad[1] else None,
            )
