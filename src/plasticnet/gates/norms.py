"""Masks norms, so that they take their statistics over the open units only, as they will in the cut network.

A closed unit still has a value where a norm reads it, because its gate acts after the norm, at the consumers. While the
module of the norm runs, a ``TorchFunctionMode`` replaces the operations that take statistics over the gated axis. The
replacements count the open entries only. Nothing is replaced while all units are open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plasticnet.tools.precision import widened
from plasticnet.tools.shapes import along


@contextmanager
def open_statistics(module: nn.Module, axis: int, mask: Tensor) -> Iterator[None]:
    """Let a module take its statistics over the open entries only within this context.

    Args:
        module: The module of the norm.
        axis: The axis along which the units lie, counted from the end.
        mask: Which entries of this axis are open, a boolean tensor of shape (length of the axis,).
    """
    modes: list[_OpenStatistics] = []

    def enter(*_: Any) -> None:
        modes.append(_OpenStatistics(axis, mask))
        modes[-1].__enter__()

    def leave(*_: Any) -> None:
        while modes:
            modes.pop().__exit__(None, None, None)

    handles = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        leave()  # because an interrupt skips the hooks


class _OpenStatistics(TorchFunctionMode):
    """Replaces operations that take statistics over an axis by versions that count its open entries only.

    Args:
        axis: The axis, counted from the end.
        mask: Which of its entries are open, a boolean tensor of shape (length of the axis,).
    """

    def __init__(self, axis: int, mask: Tensor) -> None:
        super().__init__()
        self.axis = axis
        self.mask = mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = _MASKED.get(func)
        if masked is None:
            return func(*args, **(kwargs or {}))
        return masked(self, func, *args, **(kwargs or {}))

    def over(self, x: Tensor) -> Tensor:
        """Return the mask as numbers 1 and 0, in a shape that broadcasts over ``x``."""
        return along(self.mask.to(x.dtype), self.axis, x.dim())

    def count(self) -> Tensor:
        """Return how many entries are open, or 1 where none is, so that nothing is divided by 0."""
        return self.mask.sum().clamp(min=1)

    def reads(self, x: Tensor) -> bool:
        """Return whether ``x`` has the gated axis."""
        return x.dim() >= -self.axis and x.shape[self.axis] == len(self.mask)


def _standardised(x: Tensor, mask: Tensor, dims: tuple[int, ...], count: Tensor, eps: float) -> Tensor:
    """Return a tensor less the mean of its open entries, divided by their standard deviation.

    Args:
        x: The tensor.
        mask: 1 where an entry is open and 0 elsewhere, in a shape that broadcasts over ``x``.
        dims: The dimensions over which the statistics are taken.
        count: How many entries are open in these dimensions, a scalar.
        eps: What is added to the variance.
    """
    x = x - (x * mask).sum(dims, keepdim=True) / count
    return x * torch.rsqrt((x * x * mask).sum(dims, keepdim=True) / count + eps)


def _like_torch(func: Any, y: Tensor, input: Tensor, *args: Any) -> Tensor:
    """Return a result in the dtype that torch's own norm gives, which under autocast may not be that of its input.

    Args:
        func: The function of torch that is replaced.
        y: The result, in single precision or in a higher one.
        input: What is normalised.
        args: The arguments of the function, from a tensor like the input but without samples on.
    """
    return y.to(func(*args).dtype if torch.is_autocast_enabled(input.device.type) else input.dtype)


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Return ``y * weight + bias`` in the precision of ``y``, which torch rounds once, at the end."""
    y = y if weight is None else y * weight.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _layer_norm(
    mode: _OpenStatistics, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    """Do what ``layer_norm`` does over one axis, with the statistics of its open entries."""
    if tuple(normalized_shape) != mode.mask.shape:
        return func(input, normalized_shape, weight, bias, eps)
    wide = widened(input)
    y = _scaled(_standardised(wide, mode.mask.to(wide.dtype), (-1,), mode.count(), eps), weight, bias)
    return _like_torch(func, y, input, input.new_empty(0, input.shape[-1]), normalized_shape, weight, bias)


def _rms_norm(
    mode: _OpenStatistics, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:  # fmt: skip
    """Do what ``rms_norm`` does over one axis, with the statistics of its open entries."""
    if tuple(normalized_shape) != mode.mask.shape:
        return func(input, normalized_shape, weight, eps)
    wide = widened(input)
    mean = (wide * wide * mode.mask.to(wide.dtype)).sum(-1, keepdim=True) / mode.count()
    y = (wide * torch.rsqrt(mean + (torch.finfo(input.dtype).eps if eps is None else eps))).to(input.dtype)
    y = y if weight is None else y * weight  # torch, too, rounds before it multiplies here
    return _like_torch(func, y, input, input.new_empty(0, input.shape[-1]), normalized_shape, weight)


def _group_norm(
    mode: _OpenStatistics, func: Any, input: Tensor, num_groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    """Do what ``group_norm`` does with one group, with the statistics of the open channels at all positions."""
    if num_groups != 1 or input.shape[1] != len(mode.mask):
        return func(input, num_groups, weight, bias, eps)
    # The new dimension is for inputs without positions; the result has shape (batch, positions, channels).
    flat = widened(input).unsqueeze(-1).flatten(2).transpose(1, 2)
    mask = mode.mask.to(flat.dtype)
    flat = _standardised(flat, mask, (1, 2), mode.count() * flat.shape[1], eps)
    y = _scaled(flat, weight, bias).transpose(1, 2).reshape(input.shape)
    return _like_torch(func, y, input, input.new_empty(0, len(mask), 1), 1, weight, bias)


def _mean(mode: _OpenStatistics, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Take a mean over the open entries, where it is over the gated axis alone; any other mean is left as it is."""
    dim = args[0] if args else kwargs.get("dim", kwargs.get("axis"))
    dims = [dim] if isinstance(dim, int) else list(dim or [])
    if len(dims) != 1 or not mode.reads(input) or dims[0] % input.dim() != mode.axis % input.dim():
        return func(input, *args, **kwargs)
    keepdim = bool(args[1] if len(args) > 1 else kwargs.get("keepdim", kwargs.get("keepdims", False)))
    dtype = kwargs.get("dtype") or input.dtype
    wide = widened(input.to(dtype))  # because torch, too, sums half precision in single precision
    return ((wide * mode.over(wide)).sum(dims[0], keepdim=keepdim) / mode.count()).to(dtype)


_MASKED: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    torch.mean: _mean,
    torch.Tensor.mean: _mean,
}
