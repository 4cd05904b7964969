"""More pieces and networks for `adversarial`: those with parameters of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kit.adversarial import piece


def conv(width: int, out: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(width, out or width, 1)


@piece(exact={"a": 8, "piece.up": 8})
class PixelShuffle(nn.Module):
    """Exact: a unit is the four channels that make up one channel of the larger image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = conv(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pixel_shuffle(self.up(x), 2), 2)


@piece(exact={"a": 8, "piece.down": 8})
class PixelUnshuffle(nn.Module):
    """Exact: a channel becomes four neighbouring ones, which one unit owns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = conv(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.down(F.pixel_unshuffle(x, 2)), scale_factor=2)


@piece(exact={"a": 8}, frozen={"piece.mask": "one channel broadcast over many"})
class OneMask(nn.Module):
    """Exact but for the mask, whose single channel is broadcast over many."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask = conv(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x).sigmoid()


@piece(exact={"a": 8})
class Twice(nn.Module):
    """Exact: a layer that reads its own output ties its inputs to its outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = conv(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@piece(exact={"a": 8, "piece.squeeze": 3})
class TwicePooled(nn.Module):
    """Exact: a shared layer sees two different inputs, of different extents."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.back = conv(width, 3), conv(3, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.back(self.squeeze(x.mean((2, 3), keepdim=True)).relu())
        return x * gate.sigmoid() + self.back(self.squeeze(x).tanh())


@piece(
    exact={"a": 8, "piece.squeeze": 3, "piece.wide": 8},
    otherwise=({"a": 8, "piece.squeeze": 3}, {"piece.wide": "softmax|reduced over"}),
)
class SplitAttention(nn.Module):
    """Exact, with a unit in each split, or frozen by the softmax over the splits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.squeeze, self.back = conv(width, 2 * width), conv(width, 3), conv(3, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        u = self.wide(x).unflatten(1, (2, -1))
        gap = u.sum(1).mean((2, 3), keepdim=True)
        attention = self.back(self.squeeze(gap).relu()).unflatten(1, (2, -1)).softmax(1)
        return (u * attention).sum(1)


@piece(exact={"a": 8, "piece.squeeze": 3, "piece.wide": 8})
class SplitAttentionByChunk(nn.Module):
    """Exact: the same with chunks, stacked for the softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.squeeze, self.back = conv(width, 2 * width), conv(width, 3), conv(3, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.wide(x).chunk(2, 1)
        gap = (u + v).mean((2, 3), keepdim=True)
        p, q = torch.stack(self.back(self.squeeze(gap).relu()).chunk(2, 1)).softmax(0)
        return u * p + v * q


@piece(exact={"a": 8, "piece": 8}, otherwise=({}, {"a": "product of two|cannot be cut"}))
class Einsum(nn.Module):
    """Exact (a 1x1 convolution), or frozen where it runs as a product of stacks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,oc->bohw", x, self.weight)


@piece(exact={"a": 8, "piece.query": 3})
class SpatialAttention(nn.Module):
    """Exact: units of query and key go in pairs, because their product sums over them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = conv(width, 3), conv(width, 3), conv(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        attention = torch.einsum("bci,bcj->bij", q, k).softmax(2)
        return x + torch.einsum("bij,bcj->bci", attention, v).view_as(x)


@piece(exact={"a": 8, "piece.other": 8}, otherwise=({"a": 8}, {}))
class SpatialProduct(nn.Module):
    """Exact: images are multiplied as matrices, each channel by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.other = conv(width)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.other(x).transpose(2, 3)


@piece(exact={"a": 4})
class GroupedTransposed(nn.Module):
    """Exact: a unit is a whole group, its inputs and its outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(width, width, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@piece(exact={"a": 8})
class Buffers(nn.Module):
    """Exact: a buffer that follows the channels is cut with them, one without axes stays."""

    scale: Tensor
    average: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, width, 1, 1) + 0.5, persistent=False)
        self.register_buffer("average", torch.zeros(width))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.lerp_(x.detach().mean((0, 2, 3)).to(self.average), 0.1)
            self.count += 1
        return (x - self.average[:, None, None]) * self.scale


@piece(exact={"a": 8})
class TrainingOnly(nn.Module):
    """Exact: a layer that runs in training mode only ties its channels all the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.extra = conv(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.extra(x.tanh()) if self.training else x


@piece(frozen={"a": "softmax"})
class FrozenInTraining(nn.Module):
    """Frozen: exact in evaluation, but a softmax over the channels runs in training."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1) if self.training else x


@piece(exact={"a": 8, "piece.inner": 6})
class ZeroInitialised(nn.Module):
    """Exact: a residual branch that starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.out = conv(width, 6), conv(6, width)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.inner(x).tanh())


@piece(frozen={"a": "LayerNorm"})
class ChannelNorm(nn.Module):
    """Frozen: normalised over the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


@piece(exact={"piece.layer": 8}, frozen={"a": "weight"})
class Standardised(nn.Module):
    """Exact behind the layer, whose rows are standardised one by one; frozen before: over what they read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = conv(width)

    def forward(self, x: Tensor) -> Tensor:
        w = self.layer.weight
        return F.conv2d(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), self.layer.bias)


@piece(exact={"a": 8, "piece.layer": 8})
class Functional(nn.Module):
    """Exact: the weight is used without a call of its module, so gates are folded into it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = conv(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.layer.weight, self.layer.bias)


@piece(frozen={"a": "two weights|computed|activations"})
class Hyper(nn.Module):
    """Frozen: the weight is computed from the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.make = width, nn.Linear(width, width * width)

    def forward(self, x: Tensor) -> Tensor:
        w = self.make(x.mean((0, 2, 3))).view(self.width, self.width, 1, 1)
        return F.conv2d(x, w)


@piece(frozen={"a": "both produces and consumes", "piece.layer": "both produces and consumes"})
class TransposedTwin(nn.Module):
    """Frozen: one weight encodes and its transpose decodes, so that a gate would act twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        code = self.layer(x.movedim(1, -1)).tanh()
        return F.linear(code, self.layer.weight.t()).movedim(-1, 1)


@piece(exact={"a": 2})
class Grouped(nn.Module):
    """Exact: normalisation groups of two, then convolution groups of four channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.GroupNorm(width // 2, width), nn.Conv2d(width, width, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


@piece(exact={"a": 8, "piece.layer": 4})
class Gated(nn.Module):
    """Exact: one half gates the other, and both are put together again around a batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.norm = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.layer(x), 1)
        return self.norm(torch.cat([y, -y], 1))
