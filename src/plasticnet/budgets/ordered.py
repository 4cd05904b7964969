"""Ranks values, and searches among ordered numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value: 0 for the highest, 1 for the next, and so on."""
    return np.argsort(np.argsort(-values, kind="stable"))


def most(fits: Callable[[int], bool], n: int) -> int:
    """Return the largest number up to ``n`` that fits, where every number below one that fits does, too.

    Args:
        fits: Whether a number fits. It is not asked for 0, which is taken to fit.
        n: The largest number to try.
    """
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
