"""Lets gradient checkpointing run parts of a model again under the gates of their own run.

``torch.utils.checkpoint`` runs a function a second time in the backward pass, when the gates of the forward pass are
gone. So within a run, what it will run again is wrapped in a function that brings them back. Every thread has runs of
its own; torch's functions are replaced while any thread has one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from plasticnet.errors import PlasticError
from plasticnet.tools.torch_private import replace_checkpointing

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]


class _Runs(threading.local):
    """What wraps the functions of the runs of this thread, the innermost last."""

    def __init__(self) -> None:
        self.wraps: list[Wrap] = []


class _Torch:
    """Torch's functions, which are replaced while there are runs, in whatever threads."""

    def __init__(self) -> None:
        self._changing, self._runs, self._put_back = threading.Lock(), 0, lambda: None

    def enter(self) -> None:
        """Count one more run."""
        with self._changing:
            self._runs += 1
            if self._runs == 1:
                self._put_back = replace_checkpointing(_wrapped, _refuse_reentrant)

    def leave(self) -> None:
        """Count one run less."""
        with self._changing:
            self._runs -= 1
            if not self._runs:
                self._put_back()


_RUNS, _TORCH = _Runs(), _Torch()


@contextmanager
def checkpoints_by(wrap: Wrap) -> Iterator[None]:
    """Wrap what gradient checkpointing will run again, for checkpoints of this thread within this context.

    Args:
        wrap: Takes a function and returns what is run in its place in the backward pass.

    Raises:
        PlasticError: In this context, a checkpoint is reentrant.
    """
    _TORCH.enter()
    _RUNS.wraps.append(wrap)
    try:
        yield
    finally:
        _RUNS.wraps.pop()
        _TORCH.leave()


def _wrapped(function: Function) -> Function:
    """Return what a checkpoint of this thread will run again."""
    return _RUNS.wraps[-1](function) if _RUNS.wraps else function


def _refuse_reentrant() -> None:
    """Raise `PlasticError` where a reentrant checkpoint would run layers again without their gates."""
    if _RUNS.wraps and torch.is_grad_enabled():
        raise PlasticError(
            "gradient checkpointing with use_reentrant=True (torch.utils.checkpoint) cannot be used while units are "
            "gated; pass use_reentrant=False, or gradient_checkpointing_enable({'use_reentrant': False}) in "
            "transformers"
        )
