"""Masks norms, so that they take their statistics over the open units only, as they will in the cut network.

A closed unit still has a value where a norm reads it, because its gate acts after the norm, at the consumers. While the
module of the norm runs, a ``TorchFunctionMode`` replaces the operations that take statistics over the gated axis. The
replacements count the open entries only. Nothing is replaced while all units are open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plasticnet.gates.modes import within
from plasticnet.tools.precision import widened


@dataclass(frozen=True, eq=False)
class OpenStatistics:
    """What a module takes over an axis along which gated units lie.

    Attributes:
        module: The module of the norm.
        axis: The axis, counted from the end.
        names: The names of the statistics, as ATen has them. Those of whole norms, such as ``layer_norm``, are replaced
            in any case.
        counts: Whether the length of this axis that the module reads from a shape is the number of open units, too.
    """

    module: nn.Module
    axis: int
    names: frozenset[str]
    counts: bool = False

    @contextmanager
    def over(self, mask: Tensor) -> Iterator[None]:
        """Let the module take these statistics over the open entries only within this context.

        Args:
            mask: Which entries of the axis are open, a boolean tensor of shape (length of the axis,).
        """
        with within(self.module, lambda: _Open(self, mask)):
            yield


class _Open(TorchFunctionMode):
    """Replaces operations that take statistics over an axis by versions that count its open entries only.

    Args:
        norm: The axis, and which statistics are replaced.
        mask: Which of its entries are open, a boolean tensor of shape (length of the axis,).
    """

    def __init__(self, norm: OpenStatistics, mask: Tensor) -> None:
        super().__init__()
        self.axis, self.counts, self.mask = norm.axis, norm.counts, mask
        self.names = norm.names
        self._opened: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            return _NORMS[func](self, func, *args, **kwargs)
        if func in _STATISTICS and _STATISTICS[func][0] in self.names:
            return _over_open(self, func, *args, **kwargs)
        if self.counts and func in _SHAPES:
            return _open_shape(self, func, *args, **kwargs)
        return func(*args, **kwargs)

    @property
    def opened(self) -> Tensor:
        """The indices of the open entries."""
        if self._opened is None:
            self._opened = self.mask.nonzero()[:, 0]
        return self._opened

    def count(self) -> Tensor:
        """Return how many entries are open, or 1 where none is, so that nothing is divided by 0."""
        return self.mask.sum().clamp(min=1)

    def reads(self, x: Tensor) -> bool:
        """Return whether ``x`` has the gated axis."""
        return x.dim() >= -self.axis and x.shape[self.axis] == len(self.mask)

    def along(self, x: Tensor, dim: Any) -> bool:
        """Return whether ``dim``, a number or several, names the gated axis of ``x``; None names no axis."""
        if not isinstance(dim, int | list | tuple) or isinstance(dim, bool) or not self.reads(x):
            return False
        return self.axis % x.dim() in [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]


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
    mode: _Open, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    """Do what ``layer_norm`` does over one axis, with the statistics of its open entries."""
    if tuple(normalized_shape) != mode.mask.shape:
        return func(input, normalized_shape, weight, bias, eps)
    wide = widened(input)
    y = _scaled(_standardised(wide, mode.mask.to(wide.dtype), (-1,), mode.count(), eps), weight, bias)
    return _like_torch(func, y, input, input.new_empty(0, input.shape[-1]), normalized_shape, weight, bias)


def _rms_norm(
    mode: _Open, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
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
    mode: _Open, func: Any, input: Tensor, num_groups: int, weight: Tensor | None = None,
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


def _over_open(mode: _Open, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a reduction with the open entries only, where it is over the gated axis; any other is left as it is."""
    first, *rest = args or [None]
    name = "input" if "input" in kwargs else "x"
    x = kwargs[name] if first is None else first
    _, place = _STATISTICS[func]
    dim = rest[place] if len(rest) > place else kwargs.get("dim", kwargs.get("axis"))
    if not mode.along(x, dim):
        return func(*args, **kwargs)
    opened = x.index_select(mode.axis, mode.opened)
    return func(**{**kwargs, name: opened}) if first is None else func(opened, *rest, **kwargs)


def _normalize(
    mode: _Open, func: Any, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None
) -> Tensor:
    """Divide by the length that the open entries have, where it is taken along the gated axis."""
    if "linalg_vector_norm" not in mode.names or not mode.along(input, dim):
        return func(input, p, dim, eps, out=out)
    length = input.index_select(mode.axis, mode.opened).norm(p, dim, keepdim=True)
    return torch.div(input, length.clamp_min(eps).expand_as(input), out=out)


def _open_shape(mode: _Open, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the shape of a tensor, or a part of it, as if it had the open entries only."""
    found = func(x, *args, **kwargs)
    if not mode.reads(x):
        return found
    if isinstance(found, int):
        return len(mode.opened) if mode.along(x, args[0] if args else kwargs.get("dim")) else found
    sizes = list(found)
    sizes[mode.axis] = len(mode.opened)
    return torch.Size(sizes)


# Functions that normalise as a whole.
_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.normalize: _normalize,
}
# Reductions, with the name that ATen has for each, and the place of "dim" among the arguments behind the tensor.
_STATISTICS: dict[Any, tuple[str, int]] = {
    **{f: (name, 0) for name in ("mean", "sum", "var", "std") for f in (getattr(torch, name), getattr(Tensor, name))},
    torch.var_mean: ("var_mean", 0),
    torch.std_mean: ("std_mean", 0),
    **dict.fromkeys((torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm), ("linalg_vector_norm", 1)),
}
_SHAPES = frozenset({Tensor.shape.__get__, Tensor.size})  # pyright: ignore[reportAttributeAccessIssue]
