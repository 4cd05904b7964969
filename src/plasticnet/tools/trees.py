"""Finds the tensors in nested containers."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves


def tensors_within(tree: Any) -> list[Tensor]:
    """Return the tensors in a model's inputs or output.

    Containers, dataclasses and distributions are searched. Other objects, such as a cache of keys and values, are not.
    """
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) or isinstance(leaf, Distribution):
            found += tensors_within(list(vars(leaf).values()))
    return found
