"""Reads and writes the ``feature_info`` of timm's models: a list of dicts, which say what some modules return.

Each dict has the name of a module and, under ``num_chs``, the number of channels of its output. The list may also be
the attribute ``info`` of an object.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

ATTRIBUTE = "feature_info"
_WIDTH = "num_chs"


def feature_widths(value: Any) -> list[int] | None:
    """Return the numbers of channels, or None where a value is no such information."""
    info = getattr(value, "info", value)
    if not isinstance(info, list) or not info:
        return None
    if not all(isinstance(entry, dict) and type(entry.get(_WIDTH)) is int for entry in info):
        return None
    return [entry[_WIDTH] for entry in info]


def with_feature_widths(value: Any, widths: Sequence[int]) -> Any:
    """Return a copy of the information that has other numbers of channels."""
    info = [{**entry, _WIDTH: width} for entry, width in zip(getattr(value, "info", value), widths, strict=True)]
    if isinstance(value, list):
        return info
    changed = copy.copy(value)
    changed.info = info
    return changed


def described_modules(model: nn.Module) -> list[tuple[str, int, str, int]]:
    """Return the modules within a model that such information describes.

    Returns:
        For each of them, the name of the module that holds the information, the place in it, the name of the module
        that is described, and its number of channels.
    """
    found: list[tuple[str, int, str, int]] = []
    for holder, module in model.named_modules():
        value: Any = vars(module).get(ATTRIBUTE)
        for place, width in enumerate(feature_widths(value) or []):
            described = _named(module, getattr(value, "info", value)[place].get("module"))
            if described is not None:
                found.append((holder, place, f"{holder}.{described}".removeprefix("."), width))
    return found


def described_outputs(model: nn.Module, out: Any) -> list[tuple[int, Tensor, int]]:
    """Return the tensors that a model returns and that its information describes.

    Returns:
        For each of them, the place in the information, the tensor, and its number of channels.
    """
    value = vars(model).get(ATTRIBUTE)
    widths, chosen = feature_widths(value), getattr(value, "out_indices", None)
    if widths is None or not isinstance(out, list) or chosen is None or len(out) != len(chosen):
        return []
    return [(place, t, widths[place]) for place, t in zip(chosen, out, strict=True) if isinstance(t, Tensor)]


def _named(holder: nn.Module, name: Any) -> str | None:
    """Return the name by which a holder has a module; the backbones of timm rename or wrap what they take over."""
    if not isinstance(name, str) or not name:
        return None
    known = {own for own, _ in holder.named_modules()}
    return next((own for own in (name, name.replace(".", "_"), f"model.{name}") if own in known), None)
