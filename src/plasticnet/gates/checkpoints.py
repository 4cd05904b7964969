"""Lets gradient checkpointing run parts of a model again under the gates of their own run.

``torch.utils.checkpoint`` runs a function a second time in the backward pass, when the gates of the forward pass are
gone. So within a run, what it will run again is wrapped in a function that brings them back. Every thread has runs of
its own; torch's functions are replaced while any thread has one.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from plasticnet.errors import PlasticError
from plasticnet.tools.torch_private import ways_of_checkpointing

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]


class _Run:
    """A run that is going on; an interrupt may keep it from saying that it is over, and then it is no longer held."""

    def __init__(self, wrap: Wrap) -> None:
        self.wrap = wrap


class _Runs(threading.local):
    """The runs of this thread, the innermost last."""

    def __init__(self) -> None:
        self._held: list[weakref.ref[_Run]] = []

    def add(self, run: _Run) -> None:
        """Note a run within the others."""
        self._held.append(weakref.ref(run))

    def innermost(self) -> _Run | None:
        """Return the innermost run that is going on."""
        self._held = [held for held in self._held if held() is not None]
        return self._held[-1]() if self._held else None

    def remove(self, run: _Run) -> None:
        """Forget a run."""
        self._held = [held for held in self._held if held() not in (None, run)]


class _Torch:
    """Torch's functions, which are replaced while there are runs, in whatever threads."""

    def __init__(self) -> None:
        self._changing, self._runs = threading.RLock(), weakref.WeakSet[_Run]()
        self._ways: tuple[Callable[[], None], Callable[[], None]] | None = None  # of replacing and putting back

    def enter(self, run: _Run) -> None:
        """Replace them for a run, too."""
        with self._changing:
            if self._ways is None:
                self._ways = ways_of_checkpointing(_wrapped, _refuse_reentrant)
            self._runs.add(run)
            self._ways[0]()  # each time, because an interrupt may have kept it from being done

    def leave(self, run: _Run) -> None:
        """Put them back if this was the only run."""
        with self._changing:
            self._runs.discard(run)
            if not self._runs and self._ways is not None:
                self._ways[1]()
                self._ways = None


_RUNS, _TORCH = _Runs(), _Torch()


@contextmanager
def checkpoints_by(wrap: Wrap) -> Iterator[None]:
    """Wrap what gradient checkpointing will run again, for checkpoints of this thread within this context.

    Args:
        wrap: Takes a function and returns what is run in its place in the backward pass.

    Raises:
        PlasticError: In this context, a checkpoint is reentrant.
    """
    run = _Run(wrap)
    _TORCH.enter(run)
    _RUNS.add(run)
    try:
        yield
    finally:
        _RUNS.remove(run)
        _TORCH.leave(run)


def _wrapped(function: Function) -> Function:
    """Return what a checkpoint of this thread will run again."""
    run = _RUNS.innermost()
    return function if run is None else run.wrap(function)


def _refuse_reentrant() -> None:
    """Raise `PlasticError` where a reentrant checkpoint would run layers again without their gates."""
    if _RUNS.innermost() is None or not torch.is_grad_enabled():
        return
    gc.collect()  # a run that was interrupted may be held by the cycles of an exception
    if _RUNS.innermost() is not None:
        raise PlasticError(
            "gradient checkpointing with use_reentrant=True (torch.utils.checkpoint) cannot be used while units are "
            "gated; pass use_reentrant=False, or gradient_checkpointing_enable({'use_reentrant': False}) in "
            "transformers"
        )
