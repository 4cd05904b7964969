"""Kinds of soak_networks.py whose weights are no layers of torch: stacks, memories, powers and products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import LAST, Place
from soak_kinds import kind
from torch import Tensor, nn


@kind("vector")
class CrossNetwork(nn.Module):
    """The first features times a sum of the present ones, as in DCN; of two ranks."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.pick(1, place.width)
        self.stem = place.mix(place.width, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 1 if middle == 1 else 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the crossed features."""
        first = x = self.stem(x)
        for layer in self.layers:
            x = first * layer(x) + x
        return x


@kind(*LAST)
class FactorisationMachine(nn.Module):
    """All pairs of features, from the square of a sum and a sum of squares."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(place.width, 8), nn.Linear(8, 6)
        self.v = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear and the paired part."""
        x = self.first(x).relu()
        return self.linear(x) + 0.5 * ((x @ self.v) ** 2 - x**2 @ self.v**2)


@kind(*LAST)
class FourierFeatures(nn.Module):
    """Sines and cosines of a projection, which is learned or fixed, beside each other."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.b = nn.Linear(place.width, place.new(), bias=place.pick(True, False))
        self.b.requires_grad_(place.pick(True, False))
        self.out = nn.Linear(2 * self.b.out_features, place.new())

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer of the waves."""
        x = self.b(x)
        return self.out(torch.cat([x.sin(), x.cos()], dim=-1))


@kind(*LAST)
class EinsumExperts(nn.Module):
    """Experts whose weights are one tensor, all of which run, weighted by a router."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle, out = place.new(), place.new()
        self.router = nn.Linear(place.width, 3)
        self.up = nn.Parameter(torch.randn(3, place.width, middle) / 3)
        self.down = nn.Parameter(torch.randn(3, middle, out) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture of the experts."""
        h = torch.einsum("...i,eio->...eo", x, self.up).relu()
        h = torch.einsum("...ei,eio->...eo", h, self.down)
        return torch.einsum("...eo,...e->...o", h, self.router(x).softmax(-1))


@kind(*LAST)
class Polynomials(nn.Module):
    """A sum of functions of each feature alone, which are weighted powers, as in a KAN."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.first = nn.Linear(place.width, middle)
        self.weight = nn.Parameter(torch.randn(middle, 3, place.new()) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums."""
        x = self.first(x).tanh()
        return torch.einsum("...ip,ipo->...o", torch.stack([x, x * x, x * x * x], dim=-1), self.weight)


@kind(*LAST)
class Monarch(nn.Module):
    """Two block-diagonal layers with a permutation between them."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first = nn.Linear(place.width, 8)
        self.a, self.b = nn.Parameter(torch.randn(2, 4, 4) / 2), nn.Parameter(torch.randn(4, 2, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after both."""
        x = self.first(x).relu()
        y = torch.einsum("...gi,gio->...go", x.unflatten(-1, (2, 4)), self.a)
        y = torch.einsum("...gi,gio->...go", y.transpose(-1, -2), self.b)
        return y.flatten(-2)


@kind(*LAST)
class Memory(nn.Module):
    """Keys and values that are parameters, of which every step reads a mixture."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.query = nn.Linear(place.width, 6)
        self.keys, self.values = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7, place.new()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture of the values."""
        return F.softmax(self.query(x) @ self.keys.t() * 6**-0.5, dim=-1) @ self.values


@kind(*LAST)
class Codebook(nn.Module):
    """A soft choice among vectors, by their distance."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first = nn.Linear(place.width, 4)
        self.codes = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, drawn towards the codes."""
        x = self.first(x)
        near = (x.unsqueeze(-2) - self.codes).square().sum(-1).neg().softmax(-1)
        return x + near @ self.codes


@kind(*LAST)
class Capsules(nn.Module):
    """Groups of features, whose lengths are squashed."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(place.width, 12), nn.Linear(12, place.new())

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer of the squashed capsules."""
        x = self.first(x)
        groups = x.view(*x.shape[:-1], 3, 4)
        square = groups.pow(2).sum(-1, keepdim=True)
        return self.out((groups * square.sqrt() / (1 + square)).reshape(*x.shape[:-1], 12))
