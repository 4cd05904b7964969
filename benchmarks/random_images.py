"""Pieces of random networks whose channels come first, and what leads from one domain to another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import CONVS, FIRST, TRANSPOSED, Place, activation, kind
from random_layers import Piece
from torch import Tensor, nn

POOLS = ((F.avg_pool1d, F.max_pool1d), (F.avg_pool2d, F.max_pool2d), (F.avg_pool3d, F.max_pool3d))


def conv(place: Place, width: int, out: int, size: int = 3, **options: object) -> nn.Module:
    """Return a convolution that keeps the extents."""
    return CONVS[place.rank - 1](width, out, size, padding=size // 2, **options)


@kind(*FIRST, often=3)
def Convolution(place: Place) -> nn.Module:
    """A convolution, with any padding, and an activation."""
    mode = place.pick("zeros", "zeros", "circular", "replicate")
    bias = place.pick(True, True, False)
    layer = conv(place, place.width, place.new(), bias=bias, padding_mode=mode)
    return nn.Sequential(layer, activation(place))


@kind(*FIRST, often=2)
def Grouped(place: Place) -> nn.Module:
    """A grouped convolution."""
    groups = place.divisor(place.width)
    return conv(place, place.width, groups * place.pick(1, 2, 3), groups=groups)


@kind(*FIRST, often=2)
def Depthwise(place: Place) -> nn.Module:
    """A depthwise convolution, alone or before one with a kernel of 1."""
    times = place.pick(1, 1, 2)
    deep = conv(place, place.width, times * place.width, groups=place.width)
    return deep if place.pick(True, False) else nn.Sequential(deep, place.mix(times * place.width, place.new()))


@kind(*FIRST, often=1.5)
def Transposed(place: Place) -> nn.Module:
    """A transposed convolution, plain, grouped or depthwise."""
    groups = place.pick(1, 1, place.divisor(place.width), place.width)
    return TRANSPOSED[place.rank - 1](place.width, groups * place.pick(1, 2, 4), 3, padding=1, groups=groups)


@kind(*FIRST, keeps=False)
def Strided(place: Place) -> nn.Module:
    """A strided or dilated convolution."""
    layer = CONVS[place.rank - 1]
    if min(place.x.shape[2:]) < 4:
        return layer(place.width, place.new(), 1)
    return layer(place.width, place.new(), 2, stride=2) if place.pick(True, False) else layer(place.width, 4, 2)


@kind(*FIRST)
class Inverted(Piece):
    """An inverted bottleneck: up, depthwise, squeeze, down."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        hidden = 2 * place.width
        self.up, self.deep = place.mix(place.width, hidden, bias=False), conv(place, hidden, hidden, groups=hidden)
        self.norm, self.down = nn.GroupNorm(hidden, hidden), place.mix(hidden, place.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.norm(self.deep(F.relu6(self.up(x))))))


@kind(*FIRST)
class Ghost(Piece):
    """Half of the channels are made from the other half."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        half = place.new()
        self.main, self.cheap = place.mix(place.width, half), conv(place, half, half, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x).relu()
        return torch.cat([y, self.cheap(y)], 1)


@kind(*FIRST)
class Shuffle(Piece):
    """A channel shuffle, whose groups are an attribute."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.groups, self.own = place.divisor(place.width), place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and not self.own:
            return F.channel_shuffle(x, self.groups)
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


@kind("image")
class PixelShuffle(Piece):
    """Channels become pixels, or pixels channels, and back to the old extents."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.up = place.pick(True, False) or place.x.shape[2] % 2 == 1 or place.x.shape[3] % 2 == 1
        new = place.new()
        self.layer = nn.Conv2d(place.width, 4 * new, 1) if self.up else nn.Conv2d(4 * place.width, new, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return F.avg_pool2d(F.pixel_shuffle(self.layer(x), 2), 2)
        return F.interpolate(self.layer(F.pixel_unshuffle(x, 2)), scale_factor=2)


@kind(*FIRST)
class SpatialGate(Piece):
    """A gate on every place, from mean and largest over the channels, or from one channel of a layer."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.own, self.layer, self.one = place.pick(True, False), conv(place, 2, 1), place.mix(place.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.own:
            return x * self.one(x).sigmoid()
        return x * self.layer(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


@kind(*FIRST)
class ChannelStatistics(Piece):
    """Instance norm, local response norm, global response norm, or a norm over everything."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how, shape = place.pick("instance", "local", "global", "everything", "standard"), place.x.shape[1:]
        self.norm = nn.LayerNorm(list(shape))
        self.weight = nn.Parameter(place.per_channel(torch.empty(place.width)))

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "instance":
                return F.instance_norm(x, eps=0.1)
            case "local":
                return F.local_response_norm(x, 3)
            case "global":
                size = x.square().sum(self.others, keepdim=True).add(1e-3).sqrt()
                return x + self.weight * x * (size / (size.mean(1, keepdim=True) + 1e-3))
            case "everything":
                return self.norm(x)
            case _:
                return (x - x.mean(self.others, keepdim=True)) / (x.std(self.others, keepdim=True) + 0.1)


@kind("image")
class StandardisedConv(Piece):
    """A convolution whose weight is normalised as the model runs."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer = nn.Conv2d(place.width, place.new(), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.layer.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(x, w, self.layer.bias, padding=1)


@kind("image")
class SpatialAttention(Piece):
    """Attention over the places of an image, in heads."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.size, heads = place.pick(2, 4), place.pick(1, 2, 3)
        self.qkv, self.out = (
            nn.Conv2d(place.width, 3 * heads * self.size, 1),
            nn.Conv2d(heads * self.size, place.width, 1),
        )
        self.product = place.pick("matmul", "einsum")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(1, (-1, self.size)).flatten(3) for y in self.qkv(x).chunk(3, 1))
        if self.product == "einsum":
            scores = torch.einsum("bhci,bhcj->bhij", q, k).softmax(-1)
            y = torch.einsum("bhij,bhcj->bhci", scores, v)
        else:
            y = v @ (q.mT @ k).softmax(-1).mT
        return x + self.out(y.flatten(1, 2).unflatten(2, x.shape[2:]))


@kind(*FIRST)
class FixedKernel(Piece):
    """A blur with a fixed kernel for each channel, a buffer that the forward expands."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.register_buffer("kernel", torch.rand(1, 1, *[3] * place.rank))
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[place.rank - 1]

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return self.convolve(x, self.kernel.expand(c, *self.kernel.shape[1:]), padding=1, groups=c)


@kind(*FIRST, often=1.5)
class Pooling(Piece):
    """Pooling that keeps the extents, or adds what is pooled to what is there."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.pools, self.how = POOLS[place.rank - 1], place.pick("average", "largest", "mean", "resample")

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "average":
                return self.pools[0](x, 3, 1, 1)
            case "largest":
                return x + self.pools[1](x, 3, 1, 1)
            case "mean":
                return x - x.mean(self.others, keepdim=True)
            case _:
                return F.interpolate(self.pools[0](x, 2, ceil_mode=True), size=x.shape[2:])


@kind(*FIRST, keeps=False, often=1.5)
class Halve(Piece):
    """Pooling by two."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.pool, self.size = POOLS[place.rank - 1][place.pick(0, 1)], 2 if min(place.x.shape[2:]) > 3 else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x, self.size)


# -- from one domain to another ---------------------------------------------------------------


@kind(*FIRST, "sequence", keeps=False, to="vector", often=0)
class Pool(Piece):
    """The mean, the largest, or the last of all places."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("mean", "largest", "corner", "both")

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2) if self.axis == 1 else x.mT
        match self.how:
            case "mean":
                return x.mean(2)
            case "largest":
                return x.amax(2)
            case "corner":
                return x[..., -1]
            case _:
                return torch.cat([x.mean(2), x.std(2)], 1)


@kind(*FIRST, "sequence", keeps=False, to="vector", often=0)
class Flatten(Piece):
    """Everything of a sample in a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@kind(*FIRST, keeps=False, to="sequence", often=0)
class Steps(Piece):
    """Places become steps."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


@kind("sequence", keeps=False, to="signal", often=0)
class Signal(Piece):
    """Steps become places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 1).contiguous()


@kind("vector", keeps=False, to="sequence", often=0)
class Unfold(Piece):
    """A layer makes the steps."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer, self.steps, self.order = nn.Linear(place.width, 4 * 4), 4, place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.view(len(x), self.steps, -1) if self.order else y.unflatten(1, (-1, self.steps)).mT


@kind("vector", keeps=False, to="image", often=0)
class Decode(Piece):
    """A layer makes an image, as in a generator."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer = nn.Linear(place.width, place.new() * 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(len(x), -1, 2, 2)
