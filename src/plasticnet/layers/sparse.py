"""Sparse layers: linear layers with many zeros, in a form in which torch multiplies without the zeros."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.layers.replacing import replaced
from plasticnet.tools.snapshot import duplicate

ENOUGH = {"csr": 0.8, "2:4": 0.5}  # the share of zeros that a layer must have to be converted, by layout


class SparseLinear(nn.Module):
    """A linear layer that stores only the nonzero entries of its weight, by rows (CSR); for inference.

    It computes in the precision of its weight, and has no parameters that could be trained.

    Args:
        layer: The layer whose weight and bias are copied.

    Example:
        >>> import torch, plasticnet as pn
        >>> layer = torch.nn.Linear(4, 2)
        >>> with torch.no_grad():
        ...     layer.weight[:, 1:] = 0.0
        >>> pn.SparseLinear(layer)
        SparseLinear(4, 2, nonzero=2, bias=True)
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        with warnings.catch_warnings():  # Torch warns once that this layout is in beta state.
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
        """Apply the layer: inputs of shape (..., in_features) become outputs of shape (..., out_features)."""
        with torch.autocast(x.device.type, enabled=False):  # Half precision has no such product.
            return F.linear(x.to(self.values.dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes, the number of nonzero entries, and whether there is a bias."""
        return f"{self.in_features}, {self.out_features}, nonzero={len(self.values)}, bias={self.bias is not None}"


def sparsify(
    module: nn.Module, layout: Literal["csr", "2:4"] = "csr", *, layers: Sequence[str] = ("*",)
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a module in which linear layers with many zeros are sparse.

    It is meant for what `PlasticNet.compact` returns for a network with gates on single weights. The layers within an
    ``nn.TransformerEncoderLayer`` stay unchanged, because its fused forward reads dense weights.

    Args:
        module: The module, which is not changed.
        layout: "csr" stores the nonzero entries of every row, in single or double precision, and is for layers with at
            least 80 % zeros. "2:4" is torch's semi-structured layout for the sparse tensor cores of NVIDIA's GPUs, in
            half precision, and is for layers with at least 50 % zeros: of every four neighbours in a row at most two
            may be nonzero.
        layers: Name patterns of the layers to convert.

    Returns:
        The copy, in evaluation mode, and the names of the layers that were converted.

    Raises:
        PlasticError: The layout is unknown, no layer has enough zeros, or a layer with enough zeros cannot have the
            layout; the message names the layer and the reason.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     model[0].weight[:, 1:] = 0.0
        >>> small, names = pn.sparsify(model)
        >>> names
        ('0',)
        >>> small[0]
        SparseLinear(8, 4, nonzero=4, bias=True)
    """
    if layout not in ENOUGH:
        raise PlasticError(f"layout={layout!r}: choose one of {', '.join(ENOUGH)}")
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    small = duplicate(module).eval()
    # The fused forward of these layers reads dense weights.
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
            small = replaced(small, linear[name], SparseLinear(linear[name]).eval())
        else:
            _semi_structure(name, linear[name])
    return small, chosen


def sparse_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that `sparsify` has converted."""
    return tuple(
        name
        for name, m in module.named_modules()
        if isinstance(m, SparseLinear)
        or (type(m) is nn.Linear and isinstance(m.weight, torch.sparse.SparseSemiStructuredTensor))
    )


def _semi_structure(name: str, layer: nn.Linear) -> None:
    """Give a linear layer a weight in the layout "2:4".

    Raises:
        PlasticError: The layer cannot have this layout; the message says why. Nothing was changed.
    """
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
        except (RuntimeError, NotImplementedError) as error:  # The size or the GPU is not supported.
            reason = str(error).splitlines()[0]
        else:
            layer.weight = nn.Parameter(sparse, requires_grad=False)
            return
    raise PlasticError(f'layer {name!r} of shape {tuple(weight.shape)} cannot be "2:4": {reason}')
