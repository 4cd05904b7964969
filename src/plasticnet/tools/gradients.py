"""Runs models without gradients where that is possible: a forward that takes a gradient itself needs its graph.

Forces are such a gradient, the derivative of an energy with respect to positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
# What torch says where a gradient, or a hook on one, is asked for and nothing has a graph.
_MISSED = ("does not require grad", "doesn't require gradient", "requires_grad=False")


class _Scope(threading.local):
    """Whether the models that this thread runs take gradients themselves."""

    needed = False


_SCOPE = _Scope()


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
