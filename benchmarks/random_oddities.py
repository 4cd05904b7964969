"""Pieces of random networks that norm, count, pick by position, keep state or draw random numbers.

Many of them must be frozen, and say why.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import ANY, FIRST, NORMS, Place, activation, kind
from random_layers import Piece
from torch import Tensor, nn


class OverChannels(Piece):
    """Runs a module on tensors whose channels are the last axis."""

    def __init__(self, place: Place, module: nn.Module) -> None:
        super().__init__(place)
        self.norm = module

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1) if self.axis == 1 else self.norm(x)


@kind(*ANY, often=2)
def LayerNorm(place: Place) -> nn.Module:
    """Torch's LayerNorm or RMSNorm over the channels."""
    norm = place.pick(nn.LayerNorm, nn.RMSNorm)(place.width)
    return OverChannels(place, norm) if place.first else norm


@kind(*ANY, often=2)
class OwnNorm(Piece):
    """A norm that is written out: centred or not, over the channels."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.weight = nn.Parameter(place.per_channel(torch.ones(place.width)))
        self.bias = nn.Parameter(place.per_channel(torch.zeros(place.width))) if place.pick(True, False) else None
        self.how = place.pick("centred", "rms", "var", "norm")

    def forward(self, x: Tensor) -> Tensor:
        if self.how in ("centred", "var"):
            x = x - x.mean(self.axis, keepdim=True)
        if self.how == "var":
            y = x / (x.var(self.axis, keepdim=True, unbiased=False) + 1e-5).sqrt()
        elif self.how == "norm":
            y = x / (x.norm(dim=self.axis, keepdim=True) * x.shape[self.axis] ** -0.5 + 1e-5)
        else:
            y = x * torch.rsqrt(x.pow(2).mean(self.axis, keepdim=True) + 1e-5)
        y = y * self.weight
        return y if self.bias is None else y + self.bias


@kind(*ANY, often=2)
class BatchNorm(Piece):
    """Batch norm, with or without parameters."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.last = place.domain == "sequence"
        self.norm = NORMS[max(place.rank - 1, 0)](place.width, affine=place.pick(True, True, False))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2) if self.last else self.norm(x)


@kind("vector", *FIRST, often=2)
def GroupNorm(place: Place) -> nn.Module:
    """Group norm: several groups, one, or one for each channel."""
    groups = place.pick(place.divisor(place.width), 1, place.width if place.first else 1)
    return nn.GroupNorm(groups, place.width, affine=place.pick(True, True, False))


@kind(*ANY)
class UnitLength(Piece):
    """Channels scaled to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=self.axis)


@kind(*ANY)
class OverTheChannels(Piece):
    """Something taken over the channels: softmax, mean, largest, running sum, order."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("softmax", "mean", "amax", "cumsum", "sort", "logsumexp", "std")

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "softmax":
                return x.softmax(self.axis)
            case "cumsum":
                return x.cumsum(self.axis)
            case "sort":
                return x.sort(self.axis).values
            case "logsumexp":
                return x - x.logsumexp(self.axis, keepdim=True)
            case _:
                return x + getattr(x, self.how)(self.axis, keepdim=True)


@kind(*ANY)
class ByWidth(Piece):
    """A number that follows from the width, read from the tensor or kept on the module."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.width, self.how = place.width, place.pick("shape", "attribute", "numel", "view", "tuple")
        if self.how == "view" and place.width % 2:
            self.how = "shape"
        self.scale, self.ones = (
            nn.Parameter(torch.ones(place.width)),
            (-1, *place.per_channel(torch.ones(place.width)).shape),
        )

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "shape":
                return x * x.shape[self.axis] ** -0.5
            case "attribute":
                return x * self.width**-0.5
            case "tuple":
                return x * self.scale.view(self.ones)
            case "numel":
                return x * (8.0 / x[0].numel())
            case _:
                axis = self.axis % x.dim()
                return x.unflatten(axis, (2, x.shape[axis] // 2)).tanh().flatten(axis, axis + 1)


@kind(*ANY)
class ByPosition(Piece):
    """Channels that are told apart by their position."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("first two", "one", "flip", "roll", "order", "last", "every second", "narrow", "mask")
        self.register_buffer("order", torch.randperm(place.width))
        self.register_buffer("mask", place.per_channel(torch.rand(place.width).round()))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[self.axis]
        match self.how:
            case "first two":
                a, b = x.narrow(self.axis, 0, 2), x.narrow(self.axis, 2, n - 2)
                return torch.cat([a.tanh(), b.relu()], self.axis)
            case "one":
                return x + x.narrow(self.axis, 0, 1)
            case "flip":
                return x + x.flip(self.axis)
            case "roll":
                return x + x.roll(1, self.axis).tanh()
            case "order":
                return x.index_select(self.axis, self.order)
            case "last":
                return torch.cat([x, x.select(self.axis, -1).unsqueeze(self.axis)], self.axis)
            case "every second":
                y = x.clone()
                y.movedim(self.axis, 0)[::2] *= 0.5
                return y
            case "narrow":
                half = max(n // 2, 1)
                return x.narrow(self.axis, 0, half) - x.narrow(self.axis, n - half, half)
            case _:
                return x * self.mask


@kind(*ANY)
class Padded(Piece):
    """Channels of zeros beside the others."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.ends, self.new = place.pick((0, 2), (1, 0), (2, 2)), place.pick("pad", "zeros", "cat")

    def forward(self, x: Tensor) -> Tensor:
        if self.new == "pad":
            axis = self.axis % x.dim()
            return F.pad(x, (0, 0) * (x.dim() - 1 - axis) + self.ends)
        shape = list(x.shape)
        shape[self.axis] = 3
        zeros = x.new_zeros(shape)
        return torch.cat([x, zeros if self.new == "zeros" else zeros + 1], self.axis)


@kind(*ANY)
class Pointwise(Piece):
    """What looks at each entry alone: where, clamp, powers, masks, writes in place."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("where", "clamp", "mask", "inplace", "polynomial", "prelu", "abs", "copy", "detach")
        self.prelu = nn.PReLU(place.width if place.domain != "sequence" else 1)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "where":
                return torch.where(x > 0, x, 0.1 * x.exp())
            case "clamp":
                return x.clamp(-1, 2) + x.clamp_min(0.3)
            case "mask":
                return x.masked_fill(x > 0.5, -1.0)
            case "inplace":
                return x.clone().mul_(2).add_(0.1).relu_()
            case "polynomial":
                return 0.1 * x**3 - x.square() + 1
            case "prelu":
                return self.prelu(x)
            case "abs":
                return x.abs().add(1e-3).log1p()
            case "copy":
                y = torch.empty_like(x)
                y.copy_(x)
                return y + torch.ones_like(x)
            case _:
                return x + x.detach().tanh()


@kind(*ANY, chance="always", often=0.7)
class Noise(Piece):
    """Noise, in evaluation too: on every entry, on every sample, or a mask."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("entries", "samples", "channels", "dropout", "bernoulli")

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "entries":
                return x + 0.1 * torch.randn_like(x)
            case "samples":
                return x * torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype)
            case "channels":
                shape = [1] * x.dim()
                shape[self.axis] = x.shape[self.axis]
                return x + torch.rand(shape, dtype=x.dtype)
            case "dropout":
                return F.dropout(x, 0.3, training=True)
            case _:
                return x * torch.bernoulli(torch.full_like(x, 0.7))


@kind(*ANY, chance="training")
def Dropout(place: Place) -> nn.Module:
    """Dropout in training, of entries or of whole channels."""
    if place.rank == 2 and place.first and place.pick(True, False):
        return nn.Dropout2d(0.2)
    return place.pick(nn.Dropout, nn.AlphaDropout)(0.2)


@kind(*ANY)
class Stores(Piece):
    """Keeps what it has computed as an attribute, for others to look at."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer, self.seen, self.count = place.mix(place.width, place.new()), None, 0
        self.how = place.pick("tensor", "detached", "list", "dict")

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        self.count += 1
        kept = y if self.how == "tensor" else y.detach()
        self.seen = {"list": [kept], "dict": {"y": kept}}.get(self.how, kept)
        return y


@kind(*ANY)
class State(Piece):
    """A buffer that every call changes and reads: in evaluation too, or in training only."""

    average: Tensor
    count: Tensor

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.always, self.how = place.pick(True, False), place.pick("in place", "replaced", "data")
        self.register_buffer("average", torch.zeros(place.width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.shape = tuple(place.per_channel(self.average).shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            mean = x.detach().mean([0, *self.others])
            self.count += 1
            if self.how == "in place":
                self.average.lerp_(mean, 0.1)
            elif self.how == "data":
                self.average.data = self.average.data * 0.9 + 0.1 * mean
            else:
                self.average = 0.9 * self.average + 0.1 * mean
        return x - self.average.view(-1, *self.shape) + 0.01 * self.count


@kind(*ANY)
class Auxiliary(Piece):
    """A layer that runs in training only."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.extra, self.act = place.mix(place.width, place.width), activation(place)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.extra(self.act(x * 1.0)) if self.training else x
