"""Sparse layers: linear layers with many zeros, in a form that torch multiplies without them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.tools.snapshot import duplicate
from plasticnet.tools.torch_private import children_of

ENOUGH = {"csr": 0.8, "2:4": 0.5}  # the share of zeros from which on a layer is converted


class SparseLinear(nn.Module):
    """A linear layer whose weight is kept in rows of nonzero entries (CSR), for inference."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        with warnings.catch_warnings():  # torch says once that the layout is in beta state
            warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
            weight = layer.weight.detach().to_sparse_csr()
        self.register_buffer("rows", weight.crow_indices())
        self.register_buffer("columns", weight.col_indices())
        self.register_buffer("values", weight.values())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight, in the layout ``torch.sparse_csr``."""
        return torch.sparse_csr_tensor(
            self.rows, self.columns, self.values, (self.out_features, self.in_features), check_invariants=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        with torch.autocast(x.device.type, enabled=False):  # there is no such product in half precision
            return F.linear(x.to(self.values.dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        """The sizes, and how many entries are not zero."""
        return f"{self.in_features}, {self.out_features}, nonzero={len(self.values)}, bias={self.bias is not None}"


def sparsify(
    module: nn.Module, layout: Literal["csr", "2:4"] = "csr", *, layers: Sequence[str] = ("*",)
) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy, in evaluation mode, whose linear layers with many zeros are sparse, and the names of these layers: of
    those that match the patterns in ``layers`` the ones with at least 80 % zeros ("csr") or 50 % ("2:4"). For
    `PlasticNet.compact` of a network with gates on single weights.

    "csr" keeps the nonzero entries of every row, in single or double precision. "2:4" is torch's semi-structured
    layout, for the sparse tensor cores of NVIDIA's GPUs: of every four entries of a row two at most are not zero, in
    half precision.

    The layers of torch's `nn.TransformerEncoderLayer` stay as they are: its fused forward reads dense weights.

    Raises `PlasticError` when no layer has enough zeros, and, naming the layer, when one cannot be "2:4".
    """
    if layout not in ENOUGH:
        raise PlasticError(f"layout={layout!r}: choose one of {', '.join(ENOUGH)}")
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    small = duplicate(module).eval()
    # These have a fused forward that reads dense weights.
    fused = {m for layer in small.modules() if isinstance(layer, nn.TransformerEncoderLayer) for m in layer.modules()}
    linear = {
        name: m
        for name, m in small.named_modules()
        if type(m) is nn.Linear
        and m not in fused
        and m.weight.numel()
        and any(fnmatchcase(name, pattern) for pattern in layers)
    }
    zeros = {name: float((m.weight == 0).double().mean()) for name, m in linear.items()}
    chosen = tuple(name for name in linear if zeros[name] >= ENOUGH[layout])
    if not chosen:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zeros.items()) or "there is none"
        raise PlasticError(
            f"no linear layer that matches {', '.join(layers)} has {ENOUGH[layout]:.0%} zeros or more ({shares})"
        )
    for name in chosen:
        if layout == "csr":
            if linear[name].weight.dtype not in (torch.float32, torch.float64):
                raise PlasticError(f'layer {name!r} is {linear[name].weight.dtype}: "csr" needs float32 or float64')
            small = _replaced(small, linear[name], SparseLinear(linear[name]))
        else:
            _semi_structure(name, linear[name])
    return small, chosen


def sparse_layers(module: nn.Module) -> tuple[str, ...]:
    """The names of the layers that `sparsify` has converted."""
    return tuple(
        name
        for name, m in module.named_modules()
        if isinstance(m, SparseLinear)
        or (type(m) is nn.Linear and isinstance(m.weight, torch.sparse.SparseSemiStructuredTensor))
    )


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put a module wherever the model holds another; returns the model."""
    if model is old:
        return new.eval()
    for parent in list(model.modules()):
        for key, child in children_of(parent).items():
            if child is old:
                children_of(parent)[key] = new.eval()
    return model


def _semi_structure(name: str, layer: nn.Linear) -> None:
    weight = layer.weight.detach()
    rows, columns = weight.shape
    reason = ""
    if columns % 4:
        reason = f"its rows have {columns} entries, which are not a multiple of 4"
    elif (most := int((weight.reshape(rows, -1, 4) != 0).sum(2).max())) > 2:
        reason = f"{most} of some 4 neighbours in a row are not zero; the layout has room for 2"
    elif weight.dtype not in (torch.float16, torch.bfloat16) or not weight.is_cuda:
        reason = f"its weight is {weight.dtype} on {weight.device}: it must be float16 or bfloat16, on a GPU"
    if not reason:
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weight)
        except (RuntimeError, NotImplementedError) as error:  # a size or a GPU that it does not support
            reason = str(error).splitlines()[0]
        else:
            layer.weight = nn.Parameter(sparse, requires_grad=False)
            return
    raise PlasticError(f'layer {name!r} of shape {tuple(weight.shape)} cannot be "2:4": {reason}')
