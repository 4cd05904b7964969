"""Kinds of soak_networks.py that lead from one domain to another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import CONVS, FIRST, Place
from soak_kinds import STEPS, kind
from torch import Tensor, nn


@kind("image", "signal", keeps=False, to="sequence")
class Patches(nn.Module):
    """A convolution with a stride, whose places become steps, and a table of positions."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.conv = CONVS[place.rank - 1](place.width, place.new(), 2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, STEPS, self.conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the steps."""
        return self.conv(x).flatten(2).transpose(1, 2) + self.positions


@kind(*FIRST, keeps=False, to="vector")
class PowerMean(nn.Module):
    """The mean of a power that is learned (GeM)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.p, self.others = nn.Parameter(torch.tensor(2.0)), place.others

    def forward(self, x: Tensor) -> Tensor:
        """Return a vector."""
        p = self.p.clamp(1.0, 4.0)
        return x.clamp(min=1e-2).pow(p).mean(self.others).pow(1 / p)


@kind("image", "signal", "sequence", keeps=False, to="vector")
class Statistics(nn.Module):
    """Means and deviations beside each other."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.others = place.others

    def forward(self, x: Tensor) -> Tensor:
        """Return a vector."""
        variance, mean = torch.var_mean(x, self.others)
        return torch.cat([mean, (variance + 1e-3).sqrt()], dim=1)


@kind("image", "signal", keeps=False, to="vector")
class WeightedPlaces(nn.Module):
    """A softmax over places, from a layer with one channel."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.score = place.mix(place.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a vector."""
        weights = self.score(x).flatten(2).softmax(-1)
        return torch.matmul(x.flatten(2), weights.transpose(1, 2)).squeeze(-1)


@kind("image", "signal", keeps=False, to="vector")
class CoarseFlat(nn.Module):
    """Pooled to a few places, then flattened."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        pools = {1: (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 2: (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)}
        self.pool = place.pick(*pools[place.rank])(2)
        self.out = nn.Linear(place.width * 2**place.rank, place.new())

    def forward(self, x: Tensor) -> Tensor:
        """Return a vector."""
        return self.out(self.pool(x).flatten(1)).relu()


@kind("sequence", keeps=False, to="vector")
class AskedOnce(nn.Module):
    """A query that is learned attends to all steps."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.query, self.k, self.v = nn.Parameter(torch.randn(6)), nn.Linear(place.width, 6), nn.Linear(place.width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return a vector."""
        return torch.einsum("bt,btd->bd", (self.k(x) @ self.query).softmax(1), self.v(x))


@kind("sequence", keeps=False, to="vector")
class Residuals(nn.Module):
    """Differences from centres, added up by how near they are (NetVLAD)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first, self.near = nn.Linear(place.width, 5), nn.Linear(5, 3)
        self.centres = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Return a vector."""
        x = self.first(x).tanh()
        found = torch.einsum("btk,btkd->bkd", self.near(x).softmax(-1), x.unsqueeze(2) - self.centres)
        return F.normalize(found, dim=2).flatten(1)


@kind("vector", keeps=False, to="sequence")
class SaidAgain(nn.Module):
    """A vector at every step, and what tells the steps apart."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first = nn.Linear(place.width, place.new())
        self.steps = nn.Embedding(STEPS, self.first.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the steps."""
        return self.first(x).unsqueeze(1) + self.steps.weight
