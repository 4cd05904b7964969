"""Pieces of random networks that use weights in unusual ways: shared, computed, adapted, or by functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import ANY, LAST, Place, activation, kind
from random_layers import Piece
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


@kind(*ANY)
class Tied(Piece):
    """Two layers with one weight."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.a, self.b = place.mix(place.width, place.width), place.mix(place.width, place.width)
        self.b.weight = self.a.weight
        self.act = activation(place)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


@kind(*LAST)
class Autoencoder(Piece):
    """A weight that encodes, and its transpose that decodes."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer = nn.Linear(place.width, place.new(), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x).tanh(), self.layer.weight.t())


@kind(*ANY)
def Parametrized(place: Place) -> nn.Module:
    """A weight that is computed: normalised, masked, scaled, or a low-rank update."""
    layer = place.mix(place.width, place.new())
    how = place.pick("weight_norm", "spectral_norm", "mask", "scale")
    if how == "weight_norm":
        return parametrizations.weight_norm(layer)
    if how == "spectral_norm":
        return parametrizations.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", Masked(layer.weight) if how == "mask" else Scaled())
    return layer


class Masked(nn.Module):
    """A fixed mask on a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand(weight.shape) > 0.3).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Scaled(nn.Module):
    """A weight times a number that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@kind(*LAST)
class Lora(Piece):
    """A layer that does not train, and a low-rank update, as two layers or as a sum of weights."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.base = nn.Linear(place.width, place.new()).requires_grad_(False)
        self.a, self.b = nn.Linear(place.width, 2, bias=False), nn.Linear(2, self.base.out_features, bias=False)
        self.merged = place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.b.weight @ self.a.weight, self.base.bias)
        return self.base(x) + self.b(self.a(x))


@kind(*LAST)
class Functional(Piece):
    """A weight of its own, used by a function or an operator."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("linear", "matmul", "einsum", "einsum ellipsis", "addmm", "broadcast", "transposed")
        self.weight = nn.Parameter(torch.empty(place.new(), place.width))
        self.bias = nn.Parameter(torch.empty(len(self.weight)))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        match self.how:
            case "linear":
                return F.linear(x, w, b)
            case "matmul":
                return x @ w.t() + b
            case "einsum":
                return torch.einsum("bi,oi->bo" if x.dim() == 2 else "bti,oi->bto", x, w)
            case "einsum ellipsis":
                return torch.einsum("...i,oi->...o", x, w).tanh() + b
            case "addmm":
                return torch.addmm(b, x.flatten(0, -2), w.t()).view(*x.shape[:-1], -1)
            case "broadcast":
                return (x.unsqueeze(-2) * w).sum(-1) + b
            case _:
                return (w @ x.transpose(-1, -2)).transpose(-1, -2) + b if x.dim() == 3 else (w @ x.t()).t() + b


@kind(*LAST)
class Bilinear(Piece):
    """Every pair of two small projections."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.a, self.b, self.own = nn.Linear(place.width, 3), nn.Linear(place.width, 4), place.pick(True, False)
        self.pairs, self.flat = nn.Bilinear(3, 4, 6), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.flat((a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)) if self.own else self.pairs(a, b)
