"""Puts one module in the place of another."""

from __future__ import annotations

from torch import nn

from plasticnet.tools.torch_private import children_of


def replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put one module wherever a model holds another, and return the model, which may be the new module itself."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for key, child in children_of(parent).items():
            if child is old:
                children_of(parent)[key] = new
    return model
