"""Runs models without gradients where that is possible: a forward that takes a gradient itself needs its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")
# What torch says where a gradient, or a hook on one, is asked for and nothing has a graph.
_MISSED = ("does not require grad", "doesn't require gradient", "requires_grad=False")


def wants_gradients(error: BaseException | None) -> bool:
    """Return whether an error, or what has caused it, says that something was to be differentiated and has no graph."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _MISSED):
            return True
        error = error.__cause__ or error.__context__
    return False


def without_gradients(run: Callable[[], T]) -> T:
    """Return what a function returns, run without gradients, or with them if its model takes a gradient itself.

    Forces are such a gradient, the derivative of an energy with respect to positions. The tensors in the result have no
    graph.

    Args:
        run: Runs a model. If it fails without gradients, it is called a second time.
    """
    try:
        with torch.no_grad():
            return run()
    except Exception as error:
        if not wants_gradients(error):
            raise
    with torch.enable_grad():
        return tree_map_only(Tensor, Tensor.detach, run())
