"""Keeps weights what they are when the direction changes that a weight_norm computes them from."""

from __future__ import annotations

import torch
from torch import Tensor


def with_kept_scale(old: Tensor, direction: Tensor, length: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return a direction and a length such that a weight_norm still multiplies every entry by what it did before.

    A weight_norm computes ``length * direction / |direction|``, with a norm over all dimensions but one. Where entries
    of a direction are cut or multiplied by gates, its norm changes, and the length must change with it. Where the whole
    direction became zero, it has no norm: there it becomes ones and the length 0, so that the weight is zero all the
    same.

    Args:
        old: The direction as it was. Where it is all zero, as for new units, lengths stay.
        direction: The direction as it is now; along ``dim`` it is as long as the old one.
        length: The length, whose shape broadcasts over the direction.
        dim: The dimension that the norm is not taken over.

    Example:
        >>> import torch
        >>> v, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]])
        >>> with_kept_scale(v, v[:, :1], g, 0)  # the weight was [[6, 8]]
        (tensor([[3.]]), tensor([[6.]]))
    """
    before, now = _norms(old, dim), _norms(direction, dim)
    gone, new = now == 0, before == 0
    scale = now / torch.where(new, 1, before)
    return torch.where(gone, 1, direction), torch.where(new, length, length * scale).to(length.dtype)


def _norms(t: Tensor, dim: int) -> Tensor:
    """Return the norms over all dimensions but one, in a shape that broadcasts."""
    others = [d for d in range(t.dim()) if d != dim]
    return torch.linalg.vector_norm(t, dim=others, keepdim=True)
