"""Reads numbers that a user gives."""

from __future__ import annotations

from numbers import Real
from typing import Any


def real(value: Any) -> float | None:
    """Return a real number as a float, or None for anything else: a bool, a text, or one that no float can hold."""
    return as_float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def as_float(value: Any) -> float | None:
    """Return the float that a value stands for, as a tensor of one number does, or None for what is no number."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def shown(value: Any) -> str:
    """Return how a value is written, for a message: of a long one only the beginning."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of some thousand digits
        return f"an {type(value).__name__} of very many digits"
    return text if len(text) <= 100 else f"{text[:60]}..."
