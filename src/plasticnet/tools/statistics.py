"""Finds the norms over the batch in a model, and says which statistics they use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from plasticnet.tools.torch_private import BatchNorm


def uses_batch_statistics(model: nn.Module) -> bool:
    """Return whether samples interact, because norms use the statistics of the batch."""
    return any(m.training or m.running_mean is None for m in _batch_norms(model))


def has_running_statistics(model: nn.Module) -> bool:
    """Return whether all norms over the batch could use running statistics."""
    return all(m.running_mean is not None for m in _batch_norms(model))


def compares_running(model: nn.Module) -> bool:
    """Return whether losses are compared under the running statistics, since those of a batch make samples interact."""
    return uses_batch_statistics(model) and has_running_statistics(model)


def _batch_norms(model: nn.Module) -> Iterator[BatchNorm]:
    """Return the norms over the batch in a model."""
    return (m for m in model.modules() if isinstance(m, BatchNorm))


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Let norms over the batch use their running statistics in this context."""
    norms = [m for m in _batch_norms(model) if m.training]
    for m in norms:
        m.training = False
    try:
        yield
    finally:
        for m in norms:
            m.training = True
