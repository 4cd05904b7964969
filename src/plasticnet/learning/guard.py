"""Refuses the backward pass of a loss after the network has changed its size.

The graph of such a loss belongs to parameters that the network does not have any more. Their gradients would be lost,
and the parameters that took their place would get none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel, Sizes


def guarded(net: GatedModel, value: Tensor) -> Tensor:
    """Return a scalar whose backward pass raises `PlasticError`, and changes nothing, after a change of size."""
    if not value.requires_grad:
        return value
    found = _Guarded.apply(value, net.sizes)
    assert isinstance(found, Tensor)
    return found


class _Guarded(torch.autograd.Function):
    """Hands a scalar on; its backward pass is the first of the graph, and asks whether the sizes are still the same."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: Sizes) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.sizes = sizes
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.sizes.past:
            raise PlasticError(
                "the network changed its size (resize, grow, prune or load_state_dict) between expected_loss or "
                "penalty and the backward pass: their graph belongs to parameters that it does not have any more. Call "
                "backward() and optimizer.step() first, or compute the loss anew"
            )
        return grad, None
