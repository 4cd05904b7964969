"""Kinds of soak_networks.py that read images and signals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import CONVS, Place
from soak_kinds import kind
from torch import Tensor, nn


def conv(place: Place, width: int, out: int, size: int = 3, dilation: int = 1, groups: int = 1) -> nn.Module:
    """Return a convolution that keeps the extents."""
    padding = dilation * (size // 2)
    return CONVS[place.rank - 1](width, out, size, padding=padding, dilation=dilation, groups=groups)  # pyright: ignore[reportCallIssue]


@kind("image")
class UNet(nn.Module):
    """Down by a stride, up by a transposed convolution, and beside it what was there before."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        a, b = place.new(), place.new()
        self.first, self.down = conv(place, place.width, a), nn.Conv2d(a, b, 2, stride=2)
        self.up, self.out = nn.ConvTranspose2d(b, b, 2, stride=2), conv(place, a + b, place.new())

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer of both."""
        x = self.first(x).relu()
        return self.out(torch.cat([x, self.up(self.down(x).relu())], dim=1))


@kind("image")
class Pyramid(nn.Module):
    """What is coarse is enlarged, and added to what is fine, as in FPN."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        a, b, out = place.new(), place.new(), place.new()
        self.fine, self.coarse = conv(place, place.width, a), conv(place, a, b)
        self.lateral, self.top = conv(place, a, out, 1), conv(place, b, out, 1)
        self.mode = place.pick("nearest", "bilinear")

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        fine = self.fine(x).relu()
        top = self.top(self.coarse(F.max_pool2d(fine, 2)).relu())
        return self.lateral(fine) + F.interpolate(top, size=fine.shape[2:], mode=self.mode)


@kind("image", "signal")
class Atrous(nn.Module):
    """Dilated convolutions side by side, and the mean of all places beside them, as in ASPP."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        a = place.new()
        self.parts = nn.ModuleList([conv(place, place.width, a, dilation=d) for d in (1, 2, 3)])
        self.pooled, self.out = conv(place, place.width, a, 1), conv(place, 4 * a, place.new(), 1)
        self.others = place.others

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer of all."""
        parts = [part(x) for part in self.parts]
        pooled = self.pooled(x.mean(self.others, keepdim=True))
        return self.out(torch.cat([*parts, pooled.expand_as(parts[0])], 1).relu())


@kind("image", "signal")
class Wave(nn.Module):
    """Dilated convolutions with gates, whose skips are added up, as in WaveNet."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle, out = place.new(), place.new()
        self.layers = nn.ModuleList()
        for dilation in (1, 2):
            gated, rest, skip = (
                conv(place, place.width, 2 * middle, 3, dilation),
                conv(place, middle, place.width, 1),
                conv(place, middle, out, 1),
            )
            self.layers.append(nn.ModuleList([gated, rest, skip]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the skips."""
        skips = []
        for gated, rest, skip in self.layers:  # type: ignore[misc]
            a, b = gated(x).chunk(2, 1)
            h = a.tanh() * b.sigmoid()
            x = x + rest(h)
            skips.append(skip(h))
        return skips[0] + skips[1]


@kind("image")
class ConvLstm(nn.Module):
    """A cell whose gates are convolutions, which reads the image twice."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.hidden = place.new()
        self.gates = conv(place, place.width + self.hidden, 4 * self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state."""
        h = c = x.new_zeros(x.shape[0], self.gates.out_channels // 4, *x.shape[2:])
        for _ in range(2):
            i, f, g, o = self.gates(torch.cat([x, h], dim=1)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


@kind("image")
class ConvGru(nn.Module):
    """A cell of two convolutions, whose state begins as a layer of the image."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        hidden = place.new()
        self.start, self.new = conv(place, place.width, hidden, 1), conv(place, place.width + hidden, hidden)
        self.r, self.z = (conv(place, place.width + hidden, hidden) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state."""
        h = self.start(x)
        for _ in range(2):
            both = torch.cat([h, x], 1)
            z = self.z(both).sigmoid()
            h = (1 - z) * h + z * self.new(torch.cat([self.r(both).sigmoid() * h, x], 1)).tanh()
        return h


@kind("image", "signal")
class SelectiveKernel(nn.Module):
    """Branches with other kernels, and a softmax over them for every channel (SKNet)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        out, middle = place.new(), place.new()
        self.small, self.large = conv(place, place.width, out, 3), conv(place, place.width, out, 3, 2)
        self.squeeze, self.select = (
            conv(place, out, middle, 1),
            nn.ModuleList([conv(place, middle, out, 1) for _ in range(2)]),
        )
        self.others = place.others

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture."""
        parts = torch.stack([self.small(x), self.large(x)], 1)
        z = self.squeeze(parts.sum(1).mean(self.others, keepdim=True)).relu()
        weights = torch.stack([s(z) for s in self.select], dim=1).softmax(1)
        return (weights * parts).sum(1)


@kind("image", "signal")
class NeighbourGate(nn.Module):
    """A gate on every channel, from its neighbours among the channels (ECA)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.layer = place.mix(place.width, place.new())
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.others = place.others

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated channels."""
        x = self.layer(x)
        gate = self.conv(x.mean(self.others).unsqueeze(1)).squeeze(1).sigmoid()
        return x * gate.view(*gate.shape, *[1] * len(self.others))


@kind("image")
class Inception(nn.Module):
    """Four branches of unequal widths side by side: kernels of 1, 3 and 5, and pooling."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        w, a, b = place.width, place.new(), place.new()
        self.one = conv(place, w, a, 1)
        self.three = nn.Sequential(conv(place, w, b, 1), nn.ReLU(), conv(place, b, a, 3))
        self.five = nn.Sequential(conv(place, w, a, 1), nn.ReLU(), conv(place, a, b, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(place, w, b, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return all branches."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1).relu()


@kind("image")
class Octave(nn.Module):
    """Channels in two resolutions, which read each other."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        high, low, out = place.new(), place.new(), place.new()
        self.to_high, self.to_low = conv(place, place.width, high), conv(place, place.width, low)
        self.hh, self.lh, self.hl, self.ll = (
            conv(place, high, out),
            conv(place, low, out),
            conv(place, high, out),
            conv(place, low, out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return both resolutions, the lower one enlarged."""
        high, low = self.to_high(x).relu(), self.to_low(F.avg_pool2d(x, 2)).relu()
        up = self.hh(high) + F.interpolate(self.lh(low), scale_factor=2.0)
        down = self.ll(low) + self.hl(F.avg_pool2d(high, 2))
        return torch.cat([up, F.interpolate(down, scale_factor=2.0)], dim=1)


@kind("image", "signal")
class ShiftedChannels(nn.Module):
    """Some channels are moved by a place, some the other way, as in TSM."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first, self.out = place.mix(place.width, 8), conv(place, 8, place.new())

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer of the moved channels."""
        a, b, c = self.first(x).split([2, 2, 4], dim=1)
        return self.out(torch.cat([a.roll(1, -1), b.roll(-1, -1), c], dim=1))


@kind("image", "signal")
class DenseStack(nn.Module):
    """Norm, relu and convolution again and again, each on all that was there before."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        growth, norm = 4, {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[place.rank]
        widths = [place.width + i * growth for i in range(3)]
        self.layers = nn.ModuleList([nn.Sequential(norm(w), nn.ReLU(), conv(place, w, growth)) for w in widths])

    def forward(self, x: Tensor) -> Tensor:
        """Return everything."""
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


@kind("image")
class Coordinates(nn.Module):
    """Where a place is, as channels beside the others; and gates from the means of rows and columns."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        out = place.new()
        self.layer, self.squeeze = conv(place, place.width + 2, out), conv(place, out, 4, 1)
        self.rows, self.columns = conv(place, 4, out, 1), conv(place, 4, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated channels."""
        n, _, h, w = x.shape
        y, z = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        x = self.layer(torch.cat([x, torch.stack([y, z]).to(x).expand(n, -1, -1, -1)], 1))
        squeezed = self.squeeze(torch.cat([x.mean(3), x.mean(2)], dim=2).unsqueeze(-1)).relu()
        rows, columns = squeezed.split([h, w], dim=2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()


@kind("image")
class Unfolded(nn.Module):
    """Patches by unfold, a layer, and back by fold."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first, self.layer = conv(place, place.width, 4, 1), nn.Linear(36, 36)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the patches overlap to."""
        x = self.first(x)
        patches = self.layer(F.unfold(x, 3, padding=1).mT).mT
        return F.fold(patches.tanh(), x.shape[2:], 3, padding=1)


@kind("image", "signal")
class Fire(nn.Module):
    """A squeeze, and two kernels side by side (SqueezeNet)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle, out = place.new(), place.new()
        self.squeeze = conv(place, place.width, middle, 1)
        self.one, self.three = conv(place, middle, out, 1), conv(place, middle, out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return both."""
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


@kind("image")
class RepVgg(nn.Module):
    """A kernel of 3, one of 1 and a plain norm, added up."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        w = place.width
        self.three, self.one = (nn.Sequential(conv(place, w, w, size), nn.BatchNorm2d(w)) for size in (3, 1))
        self.norm = nn.BatchNorm2d(w)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return (self.three(x) + self.one(x) + self.norm(x)).relu()


@kind("image")
class ConvNext(nn.Module):
    """A depthwise convolution, a norm with channels last, two layers, a scale."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        w, middle = place.width, place.new()
        self.depthwise, self.norm = conv(place, w, w, 3, groups=w), nn.LayerNorm(w)
        self.up, self.down, self.gamma = nn.Linear(w, middle), nn.Linear(middle, w), nn.Parameter(torch.ones(w))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
