"""Inputs for the models of the zoo: batches of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Factory = Callable[[], nn.Module]
Example = tuple[Factory, tuple[Any, ...] | dict[str, Any]]

BATCH = 2
LENGTH = 7
VOCABULARY = 97


def images(size: int, channels: int = 3) -> tuple[torch.Tensor]:
    """Return a batch of square images."""
    return (torch.randn(BATCH, channels, size, size),)


def tokens(length: int = LENGTH, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Return a batch of sequences of token numbers."""
    return torch.randint(2, vocabulary, (BATCH, length))
