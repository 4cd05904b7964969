"""Estimates the statistics of BatchNorms anew, which a cut makes wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def reestimated(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]) -> nn.Module | None:
    """A copy in evaluation mode whose BatchNorm statistics are those of some batches, or None where there are none.

    Args:
        model: The model, in evaluation mode.
        batches: The batches.
        run: Runs a model on a batch.
    """
    twin = copy.deepcopy(model)
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches if norms else ():
            run(twin, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return twin if norms else None
