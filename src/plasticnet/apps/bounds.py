"""Says how large the numbers are that a user may give, so that none of them ends in an error of another library."""

from __future__ import annotations

import math

from plasticnet.errors import PlasticError

_MOST = 2**31 - 1  # of epochs, rows, units and pixels
_FIRST_SEED, _LAST_SEED = -(2**63), 2**64 - 1  # that torch takes


def check_count(name: str, value: int, most: int = _MOST) -> None:
    """Raise `PlasticError` unless a count is 1 or more, and not more than there can be."""
    if value < 1:
        raise PlasticError(f"{name}: it must be 1 or more")
    if value > most:
        raise PlasticError(f"{name}: it must be {most:,} or less")


def check_finite(name: str, value: float) -> None:
    """Raise `PlasticError` unless a number is neither infinite nor NaN."""
    if not math.isfinite(value):
        raise PlasticError(f"{name}: it must be a finite number")


def check_seed(name: str, value: int) -> None:
    """Raise `PlasticError` unless a seed is one that torch takes."""
    if not _FIRST_SEED <= value <= _LAST_SEED:
        raise PlasticError(f"{name}: it must be a whole number with 64 bits")
