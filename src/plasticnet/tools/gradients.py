"""Runs models without gradients where that is possible: a forward that takes a gradient itself needs its graph.

Forces are such a gradient, the derivative of an energy with respect to positions. What changes a network runs outside
of `torch.inference_mode`, because torch lets nobody train a tensor that was made in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# What torch says where a gradient, or a hook on one, is asked for and nothing has a graph.
_MISSED = ("does not require grad", "doesn't require gradient", "requires_grad=False")


class _Scope(threading.local):
    """Whether the models that this thread runs take gradients themselves."""

    needed = False


_SCOPE = _Scope()


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave `torch.inference_mode` within this context, or within a function that this decorates.

    So parameters that are made here can be trained afterwards, and gradients can be taken, as for the prices of units.
    """
    inside = torch.is_inference_mode_enabled()  # outside of it, inference_mode(False) would undo a torch.no_grad
    with torch.inference_mode(False) if inside else nullcontext():
        yield


def trainable(t: Tensor) -> Tensor:
    """Return a tensor, or a copy of it where it was made in `torch.inference_mode` and could not be trained."""
    return t.clone() if t.is_inference() else t


def wants_gradients(error: BaseException | None) -> bool:
    """Return whether an error, or what has caused it, says that something was to be differentiated and has no graph."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _MISSED):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def without_gradients() -> Iterator[None]:
    """Run models without gradients in this context, unless `with_gradients_if_needed` has found that they need them."""
    with torch.set_grad_enabled(_SCOPE.needed):
        yield


def with_gradients_if_needed(run: Callable[[], T]) -> T:
    """Return what a function returns that runs models in contexts of `without_gradients`.

    Args:
        run: If it fails because a model takes a gradient itself, it is called once more, with gradients in all these
            contexts.
    """
    try:
        return run()
    except Exception as error:
        if _SCOPE.needed or not wants_gradients(error):
            raise
    _SCOPE.needed = True
    try:
        return run()
    finally:
        _SCOPE.needed = False
