"""Makes the copies of a model that the self-check compares: with random parameters, and in a fine precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plasticnet.tools.drawn import random_parameter
from plasticnet.tools.inputs import Call, copy_inputs
from plasticnet.tools.precision import HALF
from plasticnet.tools.snapshot import duplicate, left_as_it_was
from plasticnet.tools.torch_private import convert
from plasticnet.tools.trees import tensors_within

Twin = tuple[nn.Module, list[Call]]  # a copy of a model, and how it is called


def random_twin(model: nn.Module, calls: Sequence[Call], seed: int) -> Twin:
    """Return a copy of a model with random parameters, in evaluation mode, and its calls.

    In half precision, rounding alone moves outputs by some percent after a dozen layers. So where parameters, buffers
    or inputs have it, the copy has single precision, unless the model does not run in it.

    Args:
        model: The model.
        calls: How it is called, the first time in evaluation mode.
        seed: The parameters follow from it.
    """
    if any(t.dtype in HALF for t in (*model.parameters(), *model.buffers(), *tensors_within([vars(c) for c in calls]))):
        with suppress(Exception):  # A model may refuse single precision in any way, and memory may end.
            single, widened = _drawn(model, seed, torch.float32), _calls_in(calls, torch.float32)
            with left_as_it_was(single):
                args, kwargs = copy_inputs((widened[0].args, widened[0].kwargs))
                single(*args, **kwargs)
            return single, widened
    return _drawn(model, seed, None), list(calls)


def _drawn(model: nn.Module, seed: int, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of a model with random parameters, which are drawn in its own precision.

    Args:
        model: The model.
        seed: The parameters follow from it.
        dtype: What real numbers are cast to; None for what they are.
    """
    torch.default_generator.manual_seed(seed)

    def drawn(p: nn.Parameter) -> nn.Parameter:
        new = random_parameter(p)
        return new if dtype is None else nn.Parameter(_cast(new.detach(), dtype), new.requires_grad)

    twin = duplicate(model, drawn).eval()
    with torch.no_grad():
        for name, b in twin.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                b.uniform_(0.5, 1.5)
    return twin if dtype is None else convert(twin, partial(_cast, dtype=dtype))


def in_precision(model: nn.Module, calls: Sequence[Call], dtype: torch.dtype) -> Twin:
    """Return a copy of a model and its calls whose real numbers have a precision, and complex ones the like of it.

    Args:
        model: The model.
        calls: How it is called.
        dtype: A real type.
    """
    twin = duplicate(model, lambda p: nn.Parameter(_cast(p.detach(), dtype), p.requires_grad))
    return convert(twin, partial(_cast, dtype=dtype)), _calls_in(calls, dtype)


def _calls_in(calls: Sequence[Call], dtype: torch.dtype) -> list[Call]:
    """Return calls whose real numbers have a precision."""
    cast = partial(_cast, dtype=dtype)
    return [replace(c, args=tree_map(cast, c.args), kwargs=tree_map(cast, c.kwargs)) for c in calls]


def _cast(t: Any, dtype: torch.dtype) -> Any:
    """Return a tensor with real numbers of a precision, or complex ones of the like of it, and anything else as is."""
    if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
        return t
    return t.to(dtype.to_complex() if t.is_complex() else dtype)
