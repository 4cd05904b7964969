"""Stands in the place of a block that was removed."""

from __future__ import annotations

from typing import Any

from torch import nn


class Skip(nn.Module):
    """What is left of a block that was removed: it hands on its first input. So the other members of a
    list keep their places, which a forward may count."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        return args[0] if args else next(iter(kwargs.values()))


def remove_block(model: nn.Module, name: str) -> None:
    """Put a `Skip` in the place of a block."""
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner).add_module(key, Skip())
