"""What torch has no public name for. All reads of its private names go through this module."""

from __future__ import annotations

from torch.nn.utils import parametrize


def forget_parametrized() -> None:
    """Empty the cache of computed weights that ``torch.nn.utils.parametrize.cached`` fills."""
    parametrize._cache.clear()
