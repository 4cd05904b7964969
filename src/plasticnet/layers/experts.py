"""Holds the experts of a mixture of which some were removed."""

from __future__ import annotations

from typing import Any

from torch import nn

from plasticnet.tools.torch_private import children_of


class Experts(nn.ModuleList):
    """A list of modules that keep their names where some were removed; they are counted by their place in the list.

    It stands in the place of the ``nn.ModuleList`` of a mixture of experts, so that the names of their parameters stay.

    Example:
        >>> import torch, plasticnet as pn
        >>> experts = pn.Experts([torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Tanh()])
        >>> del experts[1]
        >>> len(experts), experts[1], list(experts.state_dict())
        (2, Tanh(), ['0.weight', '0.bias'])
    """

    def __getitem__(self, idx: Any) -> Any:
        held = list(children_of(self).values())
        return nn.ModuleList(held[idx]) if isinstance(idx, slice) else held[idx]  # pyright: ignore[reportArgumentType]

    def __delitem__(self, idx: Any) -> None:
        names = list(children_of(self))[idx]
        for name in names if isinstance(idx, slice) else [names]:
            delattr(self, name)


def remove_expert(model: nn.Module, name: str) -> None:
    """Take the expert of this name out of its dict, or out of its list, which becomes one of `Experts` if it is none.

    Args:
        model: The model.
        name: The name of the expert, whose owner is an ``nn.ModuleList`` or an ``nn.ModuleDict``.
    """
    listed, _, key = name.rpartition(".")
    held = model.get_submodule(listed)
    if not isinstance(held, Experts | nn.ModuleDict):
        owner, _, leaf = listed.rpartition(".")
        experts = Experts().train(held.training)
        for own, child in children_of(held).items():
            experts.add_module(own, child)
        model.get_submodule(owner).add_module(leaf, experts)
        held = experts
    delattr(held, key)
