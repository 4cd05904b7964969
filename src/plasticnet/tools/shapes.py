"""Shapes that broadcast over those of other tensors."""

from __future__ import annotations

from torch import Tensor


def along(values: Tensor, dims: int | tuple[int, ...], rank: int) -> Tensor:
    """Return values in a shape that broadcasts over tensors with ``rank`` dimensions.

    Args:
        values: A vector, or a tensor with one dimension for each of ``dims``.
        dims: The places of the dimensions of ``values`` in the result, in the same order. All other dimensions have
            length 1.
        rank: The number of dimensions of the result.

    Example:
        >>> import torch
        >>> along(torch.ones(3), 1, 4).shape
        torch.Size([1, 3, 1, 1])
        >>> along(torch.ones(2, 3), (0, -1), 4).shape
        torch.Size([2, 1, 1, 3])
    """
    shape = [1] * rank
    for dim, length in zip((dims,) if isinstance(dims, int) else dims, values.shape, strict=True):
        shape[dim] = length
    return values.reshape(shape)
