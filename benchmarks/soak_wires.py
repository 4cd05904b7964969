"""Kinds of soak_networks.py that can stand in every domain: what is joined, routed, scaled and shared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from random_kinds import ANY, FIRST, Place
from soak_kinds import IDS, SIDE, kind
from torch import Tensor, nn


@kind(*ANY)
class Highway(nn.Module):
    """What is carried and what is transformed add up to one."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.gate, self.way = (place.mix(place.width, place.width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture."""
        t = self.gate(x).sigmoid()
        return t * self.way(x).tanh() + (1 - t) * x


@kind(*ANY)
class ScaledResidual(nn.Module):
    """A bottleneck whose result is scaled before it is added: by a number, or by one for each channel."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.down, self.up = place.mix(place.width, middle), place.mix(middle, place.width)
        self.scale = nn.Parameter(place.per_channel(torch.ones(place.pick(1, place.width))))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.scale * self.up(F.mish(self.down(x)))


@kind(*ANY)
class Coupling(nn.Module):
    """Two halves change each other in turn, as in a reversible network."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.axis, half = place.axis, place.new()
        self.first = place.mix(place.width, 2 * half)
        self.f, self.g = (place.mix(half, half) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return both halves."""
        a, b = self.first(x).tensor_split(2, self.axis)
        a = a + self.f(b).tanh()
        b = b + self.g(a).tanh()
        return torch.cat((a, b), self.axis)


@kind(*ANY)
class EulerSteps(nn.Module):
    """One function, by which the state moves three times, by steps that are learned."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.f, self.out = place.mix(place.width, middle), place.mix(middle, place.width)
        self.steps = nn.ParameterList([nn.Parameter(torch.tensor(0.3)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        """Return where the state comes to."""
        for step in self.steps:
            x = x + step * self.out(torch.tanh(self.f(x)))
        return x


@kind(*ANY)
class DenseRouting(nn.Module):
    """A list of experts of unequal widths, each with a gate of its own, which a layer gives."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.axis, out = place.axis, place.new()
        self.experts = nn.ModuleList()
        for _ in range(3):
            middle = place.new()
            self.experts.append(nn.Sequential(place.mix(place.width, middle), nn.SiLU(), place.mix(middle, out)))
        self.router = place.mix(place.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the gated experts."""
        gates = self.router(x).sigmoid()
        parts = [e(x) * gates.narrow(self.axis, i, 1) for i, e in enumerate(self.experts)]
        return sum(parts[1:], parts[0])


@kind(*ANY)
class Lattice(nn.Module):
    """Three layers, stacked on an axis of their own, over which something is taken."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        out = place.new()
        self.layers = nn.ModuleList([place.mix(place.width, out) for _ in range(3)])
        self.how = place.pick("mean", "amax", "logsumexp", "median", "spread")

    def forward(self, x: Tensor) -> Tensor:
        """Return what is taken over the layers."""
        y = torch.stack([layer(x) for layer in self.layers])
        if self.how == "median":
            return y.median(0).values
        if self.how == "spread":
            return y.std(0) + y.mean(0)
        return getattr(y, self.how)(0)


@kind(*ANY)
class ScalarMix(nn.Module):
    """All layers of a stack, weighted by a softmax over them, as in ELMo."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.layers = nn.ModuleList([place.mix(place.width, place.width) for _ in range(2)])
        self.weights = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture."""
        found = [x]
        for layer in self.layers:
            found.append(F.elu(layer(found[-1])))
        return sum(w * h for w, h in zip(self.weights.softmax(0), found, strict=True))  # type: ignore[return-value]


@kind(*ANY)
class Siamese(nn.Module):
    """One tower that reads two things, and what they have in common and do not."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.axis, middle = place.axis, place.new()
        self.tower = nn.Sequential(place.mix(place.width, middle), nn.Tanh(), place.mix(middle, 6))
        self.out = place.mix(12, place.new())

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer of the comparison."""
        a, b = self.tower(x), self.tower(1 - x)
        return self.out(torch.cat(((a - b).abs(), a * b), self.axis))


@kind(*ANY)
class Bag(nn.Module):
    """An embedding bag of the second input, which is added to every place."""

    needs = ("ids",)

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(IDS, place.width, mode=place.pick("sum", "mean", "max"))
        self.shape = (1,) * place.rank
        self.first = place.first

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Return the sum."""
        y = self.bag(ids)
        y = y.view(*y.shape, *self.shape) if self.first else y if x.dim() == 2 else y.unsqueeze(1)
        return F.relu(x + y)


@kind(*ANY)
class SideGate(nn.Module):
    """The third input says how much of each channel there is, and is added beside a layer."""

    needs = ("side",)

    def __init__(self, place: Place) -> None:
        super().__init__()
        out = place.new()
        self.layer, self.gate, self.shift = place.mix(place.width, out), nn.Linear(SIDE, out), nn.Linear(SIDE, out)
        self.rank, self.first = place.rank, place.first

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """Return the gated channels."""
        gate, shift = self.gate(side).sigmoid(), self.shift(side)
        for _ in range(self.rank):
            gate, shift = (t.unsqueeze(-1 if self.first else 1) for t in (gate, shift))
        return self.layer(x) * gate + shift.relu()


@kind(*ANY)
class OldNorms(nn.Module):
    """A layer whose weight the old functions of torch normalise as it runs."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        norm: Any = place.pick(nn.utils.weight_norm, nn.utils.spectral_norm)
        self.a, self.b = norm(place.mix(place.width, middle)), norm(place.mix(middle, place.new()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the second layer."""
        return self.b(F.softsign(self.a(x)))


@kind(*FIRST)
class GroupsByHand(nn.Module):
    """A group norm that is written out, up to one group for each channel."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.layer, self.groups = place.mix(place.width, 8), place.pick(2, 4, 8)
        self.scale = nn.Parameter(place.per_channel(torch.ones(8)))
        self.shift = nn.Parameter(place.per_channel(torch.zeros(8)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised channels."""
        x = self.layer(x)
        groups = x.reshape(x.shape[0], self.groups, -1)
        groups = (groups - groups.mean(-1, keepdim=True)) * (groups.var(-1, keepdim=True) + 1e-3).rsqrt()
        return (groups.view_as(x) * self.scale + self.shift).relu()
