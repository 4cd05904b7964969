"""Computes products of half precision in single precision, where a processor has no instructions for half precision.

On a CPU without them torch computes such products entry by entry: forward a few times slower than in single precision,
and in the backward pass a hundred times. Here the factors are widened, which is exact, and only the result is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from plasticnet.tools.precision import HALF
from plasticnet.tools.torch_private import has_half_products

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default}


class _InSingle(TorchDispatchMode):
    """Computes products of matrices in single precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS or args[0].dtype not in HALF or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        return func(*[t.float() for t in args], **(kwargs or {})).to(args[0].dtype)


@contextmanager
def products_in_single(model: nn.Module) -> Iterator[None]:
    """Compute products of half precision in single precision within this context, on a CPU that needs it.

    It must be entered before any other mode that follows the operations of torch, so that this one sees them as they
    are.

    Args:
        model: The model that is run.
    """
    kinds = {p.dtype for p in model.parameters() if p.device.type == "cpu"} & HALF
    if all(has_half_products(kind) for kind in kinds):
        yield
        return
    with _InSingle():
        yield
