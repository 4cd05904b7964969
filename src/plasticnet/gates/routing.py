"""Keeps a router from choosing closed experts: their logits become so low that nothing is left of their probability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plasticnet.gates.modes import within


@dataclass(frozen=True, eq=False)
class Choice:
    """A router that chooses among gated experts.

    Attributes:
        module: The module within which the router runs.
        owner: The module that owns the weight of the router, or a bias of the scores by which it chooses.
        leaf: The name of this tensor in its module.
        dim: The dimension of the tensor along which the experts lie.
        gates: The gates of the experts, shape (experts,), or None before any are given.
    """

    module: nn.Module
    owner: nn.Module
    leaf: str
    dim: int
    gates: Tensor | None = None

    @contextmanager
    def over(self, mask: Tensor) -> Iterator[None]:
        """Let the router choose among the open experts only within this context.

        Args:
            mask: Which experts are open, a boolean tensor of shape (experts,).
        """
        with within(self.module, lambda: _Closed(self, mask)):
            yield


class _Closed(TorchFunctionMode):
    """Lowers the logits of closed experts where the weight of the router is multiplied, or its bias is added.

    A router may multiply by its weight in an einsum, or by its rows of length 1, for the cosines of angles.

    Args:
        choice: The router, and the gates of its experts.
        mask: Which experts are open, a boolean tensor of shape (experts,).
    """

    def __init__(self, choice: Choice, mask: Tensor) -> None:
        super().__init__()
        self.choice, self.mask = choice, mask
        self._same: list[tuple[Tensor, int]] = []  # the tensor in other forms, with the dimension of the experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _FORMS:
            self._note(func, args, kwargs, out)
            return out
        axis = self._axis(func, args, kwargs)
        return out if axis is None else self._lowered(out, axis)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note the router's tensor in another form, if an operation has made one."""
        dim = self._dim_of(args[:1])
        if dim is not None and func in _LAYOUTS:
            dim = self._moved(func, args, kwargs, dim)
        across = dim is not None and func is F.normalize and _normalised(args, kwargs) == dim
        if dim is not None and not across and isinstance(out, Tensor) and out.dim() > dim:
            self._same.append((out, dim))

    def _axis(self, func: Any, args: Any, kwargs: Any) -> int | None:
        """Return the axis of the experts in what an operation makes of the router's tensor, from the end, or None."""
        found: list[int | None] = []
        if func in _SUMS and self._dim_of((*args, *kwargs.values()), rank=1) == 0:
            found.append(-1)
        elif func in _PRODUCTS:
            weights = (*args[1:2], *(kwargs.get(name) for name in ("weight", "other", "mat2")))
            found += [-1] * (self._dim_of(weights, rank=2) == _PRODUCTS[func])
        elif func is torch.einsum:
            operands = args[1] if isinstance(args[1], list | tuple) else args[1:]
            dims = [(i, self._dim_of([t])) for i, t in enumerate(operands)]
            found += [_axis_of_sum(args[0], i, dim) for i, dim in dims if dim is not None]
        elif func is F.cosine_similarity:
            given = {**dict(zip(("x1", "x2", "dim"), args, strict=False)), **kwargs}
            pair = given["x1"], given["x2"]
            rank, summed = max(t.dim() for t in pair), given.get("dim", 1)
            dims = [(t.dim(), self._dim_of([t])) for t in pair]
            found += [_axis_beside(dim - own, summed, rank) for own, dim in dims if dim is not None]
        return found[0] if len(found) == 1 else None

    def _dim_of(self, tensors: Sequence[Any], rank: int | None = None) -> int | None:
        """Return along which dimension the experts lie, if the router's tensor of this rank is among these, or None."""
        own = getattr(self.choice.owner, self.choice.leaf)
        for same, dim in ((own, self.choice.dim), *self._same):
            if rank in (None, same.dim()) and any(t is same for t in tensors):
                return dim
        return None

    def _moved(self, func: Any, args: Any, kwargs: Any, dim: int) -> int | None:
        """Return along which dimension the experts lie after an operation that lays out entries anew, or None.

        Args:
            func: The operation.
            args: Its arguments, the router's tensor first.
            kwargs: Its arguments by keyword.
            dim: The dimension of the experts in this tensor.
        """
        own: Tensor = args[0]
        found = func(_numbered(own, dim), *args[1:], **kwargs)
        axes = [d for d, size in enumerate(found.shape) if size == len(self.mask)]
        return next((d for d in axes if torch.equal(found, _numbered(found, d))), None)

    def _lowered(self, logits: Tensor, axis: int) -> Tensor:
        """Return the logits, with the lowest number there is for closed experts.

        The derivative with respect to a gate is that of its logarithm, by which a gate between 0 and 1 would lower the
        logit of its expert, so that softmax multiplies the probability by the gate.

        Args:
            logits: The logits.
            axis: The axis of the experts, counted from the end.
        """
        if logits.dim() < -axis or logits.shape[axis] != len(self.mask):
            return logits
        shape = (-1, *[1] * (-1 - axis))
        gates = self.choice.gates
        if gates is not None and gates.requires_grad:
            fixed = gates.detach()
            logits = logits + ((gates - fixed) / torch.where(fixed > 0, fixed, 1)).to(logits.dtype).view(shape)
        return logits.masked_fill(~self.mask.view(shape), torch.finfo(logits.dtype).min)


def _numbered(t: Tensor, dim: int) -> Tensor:
    """Return a tensor of the shape of another one, whose entries are their places along one dimension."""
    numbers = torch.arange(t.shape[dim], device=t.device)
    return numbers.view(-1, *[1] * (t.dim() - 1 - dim)).expand(t.shape)


def _normalised(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the dimension over which ``F.normalize`` is asked to take a norm, counted from the front."""
    dim: int = args[2] if len(args) > 2 else kwargs.get("dim", 1)
    return dim % args[0].dim()


def _axis_of_sum(equation: Any, place: int, dim: int) -> int | None:
    """Return the axis of the result of an einsum on which one dimension of an operand lies, counted from the end.

    Args:
        equation: The equation.
        place: The place of the operand.
        dim: Its dimension.

    Returns:
        The axis, or None where it is summed over, is shared with another operand, or cannot be told.
    """
    if not isinstance(equation, str):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    term = inputs.split(",")[place]
    letter = "." if "." in term else term[dim]
    if not arrow:
        output = "".join(sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1))
    after = output.partition(letter)[2]
    known = letter.isalpha() and inputs.count(letter) == 1 and letter in output and "." not in after
    return -1 - len(after) if known else None


def _axis_beside(axis: int, summed: int, rank: int) -> int | None:
    """Return an axis after another one was summed over, counted from the end, or None where they are the same.

    Args:
        axis: The axis, counted from the end.
        summed: The other axis, counted from either side.
        rank: How many axes there were.
    """
    gone = summed - rank if summed >= 0 else summed
    return None if axis == gone else axis + (gone > axis)


# What multiplies a weight, its second argument, with the dimension of the weight that is the last one of the result.
_PRODUCTS: dict[Any, int] = {
    F.linear: 0,
    torch.matmul: 1,
    Tensor.matmul: 1,
    Tensor.__matmul__: 1,
    torch.mm: 1,
    Tensor.mm: 1,
}
_SUMS = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})
# What keeps every entry of its first argument in its place, and what lays the entries out anew.
_ENTRIES = frozenset({
    Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type, Tensor.type_as, Tensor.clone,
    Tensor.contiguous, F.normalize, torch.div, Tensor.div, Tensor.__truediv__, torch.mul, Tensor.mul, Tensor.__mul__,
})  # fmt: skip
_LAYOUTS = frozenset({
    Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.unsqueeze,
    torch.unsqueeze, Tensor.__getitem__, Tensor.view, Tensor.reshape, Tensor.expand,
    Tensor.T.__get__, Tensor.mT.__get__,  # pyright: ignore[reportAttributeAccessIssue]
})  # fmt: skip
_FORMS = _ENTRIES | _LAYOUTS
