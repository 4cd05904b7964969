"""Finds the norms over the batch of a model, and says which statistics they use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from plasticnet.tools.torch_private import BatchNorm


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether samples interact through normalisation by statistics of the batch."""
    return any(m.training or m.running_mean is None for m in _batch_norms(model))


def has_running_statistics(model: nn.Module) -> bool:
    """Whether all norms over the batch could use their running statistics."""
    return all(m.running_mean is not None for m in _batch_norms(model))


def _batch_norms(model: nn.Module) -> Iterator[BatchNorm]:
    return (m for m in model.modules() if isinstance(m, BatchNorm))


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Within this context norms over the batch use their running statistics."""
    norms = [m for m in _batch_norms(model) if m.training]
    for m in norms:
        m.training = False
    try:
        yield
    finally:
        for m in norms:
            m.training = True
