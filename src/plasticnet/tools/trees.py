"""Tensors in nests of containers."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves


def tensors_within(tree: Any) -> list[Tensor]:
    """The tensors of a model's inputs or output: in containers, dataclasses and distributions. Other objects
    (a cache of keys and values) are not looked into."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) or isinstance(leaf, Distribution):
            found += tensors_within(list(vars(leaf).values()))
    return found
