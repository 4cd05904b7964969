"""Keeps a router from choosing closed experts: their logits become so low that nothing is left of their probability."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        if func in _FORMS and args and (dim := self._dim_of(args[:1])) is not None:
            self._same.append((out, 1 - dim if func in _TURNED else dim))
        elif func in _SUMS and self._dim_of((*args, *kwargs.values()), rank=1) == 0:
            out = self._lowered(out)
        elif func in _PRODUCTS:
            weights = (*args[1:2], *(kwargs.get(name) for name in ("weight", "other", "mat2")))
            if self._dim_of(weights, rank=2) == _PRODUCTS[func]:
                out = self._lowered(out)
        return out

    def _dim_of(self, tensors: Sequence[Any], rank: int | None = None) -> int | None:
        """Return along which dimension the experts lie, if the router's tensor of this rank is among these, or None."""
        own = getattr(self.choice.owner, self.choice.leaf)
        for same, dim in ((own, self.choice.dim), *self._same):
            if rank in (None, same.dim()) and any(t is same for t in tensors):
                return dim
        return None

    def _lowered(self, logits: Tensor) -> Tensor:
        """Return the logits, with the lowest number there is for closed experts.

        The derivative with respect to a gate is that of its logarithm, by which a gate between 0 and 1 would lower the
        logit of its expert, so that softmax multiplies the probability by the gate.
        """
        if logits.shape[-1:] != self.mask.shape:
            return logits
        gates = self.choice.gates
        if gates is not None and gates.requires_grad:
            fixed = gates.detach()
            logits = logits + ((gates - fixed) / torch.where(fixed > 0, fixed, 1)).to(logits.dtype)
        return logits.masked_fill(~self.mask, torch.finfo(logits.dtype).min)


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
_TURNED = frozenset({Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.T.__get__, Tensor.mT.__get__})  # pyright: ignore[reportAttributeAccessIssue]
_FORMS = _TURNED | {
    Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type, Tensor.type_as
}  # fmt: skip
