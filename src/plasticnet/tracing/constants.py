"""Follows tensors that no resize can cut: they are neither parameters nor buffers, and follow from no input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from plasticnet.tracing.labels import Tag

_WAY_OUT = "so that nothing can cut it with the units: hold it in a buffer (register_buffer)"
_UNKNOWN = f"a tensor that is neither a parameter nor a buffer of the model, {_WAY_OUT}"
_MADE = "a tensor that forward makes anew, whose size nothing can follow: hold it in a buffer (register_buffer)"


class Constants:
    """Says of a tensor whether it was computed from a constant, and perhaps from parameters, and from which constant.

    Args:
        model: The model, whose attributes may hold such tensors, in lists and dicts, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for prefix, module in model.named_modules():
            for attribute, value in vars(module).items():
                if not attribute.startswith("_") or isinstance(value, Tensor):
                    for place, t in _held(value):
                        name = f"{prefix}.{attribute}{place}".removeprefix(".")
                        self._of[t] = f"{name}, which is an attribute and no buffer, {_WAY_OUT}"

    def behind(self, func: Any, tensors: Sequence[Tensor], tags: Sequence[Tag | None]) -> str:
        """Return the constant in what an operation makes of constants, parameters and buffers alone, or an empty text.

        Args:
            func: The operation. Random numbers are no constants.
            tensors: The tensors that it reads.
            tags: Their labels, or None for a tensor that no operation has made, and that is no parameter or buffer.
        """
        for t, tag in zip(tensors, tags, strict=True):
            if tag is None and t.numel() > 1 and t not in self._of:
                self._of[t] = _UNKNOWN
        if torch.Tag.nondeterministic_seeded in func.tags:
            return ""
        if not tensors or not self._of:
            return "" if tensors else _MADE
        known = [self._of.get(t, "") for t in tensors]
        fixed = all(own or tag is None or tag.static for own, tag in zip(known, tags, strict=True))
        return next(filter(None, known), "") if fixed else ""

    def note(self, constant: str, results: Sequence[Tensor]) -> None:
        """Note that results were made of a constant, or, with an empty text, that they are none."""
        for t in results:
            if constant or t in self._of:
                self._of[t] = constant

    def among(self, tensors: Sequence[Tensor]) -> str:
        """Return what the first constant among some tensors is, and the way out, or an empty text."""
        return next((own for t in tensors if (own := self._of.get(t, ""))), "")


def _held(value: Any, depth: int = 2) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with axes that an attribute holds, each with its place in it, such as ``[0]``."""
    if isinstance(value, Tensor) and value.numel() > 1:
        yield "", value
    elif depth and isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from ((f"[{key!r}]{place}", t) for place, t in _held(inner, depth - 1))
