"""Stands in the place of a block that was removed."""

from __future__ import annotations

from typing import Any

from torch import nn


class Skip(nn.Module):
    """A module that hands on its first input, in the place of a block that was removed.

    It keeps the other members of a list of blocks in their places, which a forward may count.

    Example:
        >>> import torch, plasticnet as pn
        >>> pn.Skip()(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument."""
        return args[0] if args else next(iter(kwargs.values()))


def remove_block(model: nn.Module, name: str) -> None:
    """Put a `Skip` in the place of the block of this name."""
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner).add_module(key, Skip())
