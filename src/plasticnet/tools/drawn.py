"""Draws random parameters and inputs, on which a model does everything that its structure allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plasticnet.tools.inputs import batch_size
from plasticnet.tools.snapshot import duplicate

_DRAWN = 1_000_003  # the most random numbers that are drawn for one parameter; it is prime, see `random_parameter`
_REPEATED, _ENTRIES = 32, 100_000  # how often samples are repeated at most, and up to how many entries of a tensor


def random_parameter(p: nn.Parameter) -> nn.Parameter:
    """Return a parameter like the given one, but with random values.

    The values of a matrix have mean 0 and variance 1 / fan-in. Those of a vector lie between 0.5 and 1.5. Integers are
    kept. At most `_DRAWN` numbers are drawn, and then repeated, because drawing a billion of them takes long. Their
    number is prime, so that no two rows of a matrix become equal. They are drawn on the CPU, whose generator alone is
    seeded.
    """
    if not (p.is_floating_point() or p.is_complex()):
        return nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    drawn = torch.empty(min(p.numel(), _DRAWN), dtype=p.dtype)
    if p.dim() > 1 or p.is_complex():
        drawn.normal_(0, (p.shape[0] / max(p.numel(), 1)) ** 0.5)
    else:
        drawn.uniform_(0.5, 1.5)
    new = torch.empty_like(p, requires_grad=False)  # which keeps the memory format
    in_order = new if new.is_contiguous() else new.new_empty(p.shape)
    for part in in_order.view(-1).split(max(len(drawn), 1)):
        part.copy_(drawn[: len(part)])
    return nn.Parameter(new.copy_(in_order), requires_grad=p.requires_grad)


def random_inputs(tree: Any, shift: float = 0.0) -> Any:
    """Return inputs of which the real tensors have random values, and the integers another order.

    There are more samples than were given, unless they are large, because a mixture of experts then uses more of them.

    Args:
        tree: The inputs.
        shift: What is added to real values.
    """
    batch = batch_size(tree, {})

    def drawn(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0 or t.is_complex():
            return t
        if t.shape[0] == batch:
            t = t.repeat(min(_REPEATED, max(_ENTRIES // max(t.numel(), 1), 1)), *[1] * (t.dim() - 1))
        if t.is_floating_point():
            return torch.randn(t.shape).to(t) + shift
        return t.flatten()[torch.randperm(t.numel()).to(t.device)].view(t.shape)

    return tree_map(drawn, tree)


def variation(model: nn.Module, tree: Any, seed: int) -> tuple[nn.Module, Any]:
    """Return a copy of a model and inputs that may lead it into branches other than the usual ones.

    Args:
        model: The model.
        tree: The inputs.
        seed: Which variation to draw. Every second has parameters of usual size, one has small ones, and one has those
            of the model; one has the inputs as they are.
    """
    torch.default_generator.manual_seed(seed)
    way = seed % 4
    twin = duplicate(model, None if way == 1 else random_parameter)
    if way == 2:
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(0.1)
    return twin, tree if way == 3 else random_inputs(tree, shift=(0.0, 2.0, -2.0)[seed // 4 % 3])
