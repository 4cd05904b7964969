"""Small networks that are hard to gate, each with the reason why it is exact or frozen.

A *piece* maps (batch, 8, 4, 4) to the same shape; it is tried between two convolutions (`Between`)
and in chains. A *network* stands for itself. Expectations name every gated site with its units, or
what must be frozen and a pattern of the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8


@dataclass(frozen=True)
class Case:
    """What is tried, and what a careful user would expect of it.

    ``exact`` are all sites that must be gated with their units; ``frozen`` maps names that must not be
    gated to a pattern of the reason. ``otherwise`` is a second pair of those, where both are right.
    """

    name: str
    why: str
    factory: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    exact: Mapping[str, int]
    frozen: Mapping[str, str] = field(default_factory=dict)
    otherwise: tuple[Mapping[str, int], Mapping[str, str]] | None = None


PIECES: dict[str, Callable[[int], nn.Module]] = {}
CASES: dict[str, Case] = {}


def images(n: int = 4) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, 4, 4),)


class Between(nn.Module):
    """Convolution, piece, convolution, and a third one, so that something can always be gated."""

    def __init__(self, piece: nn.Module) -> None:
        super().__init__()
        self.a, self.piece = nn.Conv2d(3, WIDTH, 3, padding=1), piece
        self.b, self.c = nn.Conv2d(WIDTH, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.piece(self.a(x))).tanh())


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def piece(**expected: Any) -> Callable[[Any], Any]:
    """Register a piece: a function of (batch, 8, 4, 4), or a module class that takes the width."""

    def register(what: Any) -> Any:
        def make(width: int) -> nn.Module:
            return what(width) if isinstance(what, type) else Apply(what)

        name = what.__name__
        PIECES[name] = make
        otherwise = expected.get("otherwise")
        CASES[name] = Case(
            name, what.__doc__, lambda: Between(make(WIDTH)), images, {**expected.get("exact", {}), "b": 5},
            {**expected.get("frozen", {}), "c": "reaches the model's output"},
            ({**otherwise[0], "b": 5}, otherwise[1]) if otherwise else None,
        )  # fmt: skip
        return what

    return register


def network(inputs: Callable[[], tuple[Tensor, ...]], **expected: Any) -> Callable[[type], type]:
    """Register a network."""

    def register(cls: type) -> type:
        CASES[cls.__name__] = Case(cls.__name__, cls.__doc__ or "", cls, inputs, **expected)
        return cls

    return register


# -- channels change places -------------------------------------------------------------------


@piece(exact={"a": 4})
def shuffle(x: Tensor) -> Tensor:
    """Exact: equal members of both groups live and die together, so that the groups stay equal."""
    return x.reshape(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


@piece(exact={"a": 2})
def shuffle_of_four(x: Tensor) -> Tensor:
    """Exact: as with two groups."""
    return F.channel_shuffle(x, 4)


@piece(exact={"a": 4})
def swap_halves(x: Tensor) -> Tensor:
    """Exact: equal members of both halves go together."""
    return torch.cat(x.chunk(2, 1)[::-1], 1)


@piece(frozen={"a": "reordered over its channels"}, otherwise=({"a": 8}, {}))
def flip(x: Tensor) -> Tensor:
    """Frozen: new units would come to lie at the other end. (Cutting alone would be exact.)"""
    return x.flip(1)


@piece(frozen={"a": "reordered over its channels"}, otherwise=({"a": 4}, {}))
def flip_and_add(x: Tensor) -> Tensor:
    """Frozen, or exact with mirrored pairs."""
    return x + x.flip(1).tanh()


@piece(frozen={"a": "reordered over its channels"})
def roll(x: Tensor) -> Tensor:
    """Frozen: what the last channel's place becomes depends on which channel is the last."""
    return x.roll(1, 1)


@piece(exact={"a": 8})
def roll_space(x: Tensor) -> Tensor:
    """Exact: every channel by itself (a shifted window)."""
    return x.roll((1, 2), (2, 3)).flip(3)


@piece(exact={"a": 8})
def flip_batch(x: Tensor) -> Tensor:
    """Exact: samples change places, channels do not. Rows are not their own samples afterwards."""
    return x + x.flip(0)


@piece(exact={"a#2": 5}, frozen={"a": "tracing cannot see|does not run"})
def unequal_chunk(x: Tensor) -> Tensor:
    """Frozen where the piece has a fixed length, exact where it is what is left."""
    a, b = x.split([3, x.shape[1] - 3], 1)
    return torch.cat([b, a], 1)


@piece(frozen={"a": "does not run|tracing cannot see"})
def fixed_slice(x: Tensor) -> Tensor:
    """Frozen: 4 is half of the width today, and stays 4."""
    return torch.cat([x[:, 4:].tanh(), x[:, :4]], 1)


@piece(frozen={"a": "tracing cannot see|does not run"})
def width_as_divisor(x: Tensor) -> Tensor:
    """Frozen: the width is read as a number."""
    return x / x.shape[1]


@piece(exact={"a": 2}, otherwise=({}, {"a": "tracing cannot see|does not run"}))
def width_as_slice(x: Tensor) -> Tensor:
    """Exact or frozen: which channels are doubled depends on the width modulo three. Two units of four
    channels are exact: one can go, and 4 % 3 is the 1 that is left of the 2 doubled ones."""
    return torch.cat([x[:, : x.shape[1] % 3] * 2, x[:, x.shape[1] % 3 :]], 1)


@piece(frozen={"a": "indexed by position"})
def constant_index(x: Tensor) -> Tensor:
    """Frozen: the index names channels by their number."""
    return x[:, [0, 2, 1, 3, 7, 6, 5, 4]]


@piece(frozen={"a": "single channel|position"})
def first_channel(x: Tensor) -> Tensor:
    """Frozen: another channel would be the first."""
    return x * x[:, :1].sigmoid()


@piece(frozen={"a": "single channel|position"})
def loop_over_channels(x: Tensor) -> Tensor:
    """Frozen: each channel is told apart by its number."""
    return torch.stack([c * (1 + i) for i, c in enumerate(x.unbind(1))], 1)


@piece(exact={"a": 4})
def maxout(x: Tensor) -> Tensor:
    """Exact: a unit is a pair of neighbours, of which the larger counts."""
    y = x.unflatten(1, (-1, 2)).amax(2)
    return torch.cat([y, y.tanh()], 1)


@piece(exact={"a": 8}, otherwise=({}, {"a": "rule|order"}))
def interleave(x: Tensor) -> Tensor:
    """Exact, or frozen for want of a rule: each channel twice, then the mean of the two."""
    return x.repeat_interleave(2, 1).unflatten(1, (-1, 2)).mean(2)


@piece(exact={"a": 8})
def repeated(x: Tensor) -> Tensor:
    """Exact: each channel twice, in two chunks."""
    a, b = x.repeat(1, 2, 1, 1).chunk(2, 1)
    return a * b.sigmoid()


@piece(exact={"a": 8}, otherwise=({}, {"a": "unequal"}))
def pad_channels(x: Tensor) -> Tensor:
    """Exact, or frozen for the slice's sake: zero channels are added and taken away (the shortcut of small ResNets)."""
    return F.pad(x, (0, 0, 0, 0, 0, 4))[:, : x.shape[1]]


# -- channels mix -----------------------------------------------------------------------------


@piece(frozen={"a": "softmax"})
def softmax(x: Tensor) -> Tensor:
    """Frozen: every channel has its share of one."""
    return x.softmax(1)


@piece(frozen={"a": "reduced over its channels"})
def channel_mean(x: Tensor) -> Tensor:
    """Frozen: the mean divides by the number of channels."""
    return x - x.mean(1, keepdim=True)


@piece(frozen={"a": "reduced over its channels"})
def unit_length(x: Tensor) -> Tensor:
    """Frozen: a closed channel still has a length."""
    return F.normalize(x, dim=1)


@piece(frozen={"a": "cumsum"})
def running_sum(x: Tensor) -> Tensor:
    """Frozen: later channels hold the sum of the earlier ones."""
    return x.cumsum(1)


@piece(frozen={"a": "over its channels|no rule|reshape"})
def local_response(x: Tensor) -> Tensor:
    """Frozen: neighbouring channels normalise each other."""
    return F.local_response_norm(x, 3)


@piece(exact={"a": 8})
def sorted_rows(x: Tensor) -> Tensor:
    """Exact: each channel is sorted by itself, and put back in order by places of its own."""
    y, places = x.sort(2, descending=True)
    return torch.zeros_like(x).scatter_(2, places, y.cummax(2)[0])


@piece(exact={"a": 8})
def messages(x: Tensor) -> Tensor:
    """Exact: places send to others, along an index that was expanded over the channels."""
    nodes = x.flatten(2)
    to = torch.arange(15, -1, -1).div(2, rounding_mode="floor").expand(*nodes.shape[:2], -1)
    most = torch.zeros_like(nodes).scatter_reduce(2, to, nodes, "amax", include_self=False)
    return (nodes + most.index_add(2, to[0, 0], nodes.tanh())).view_as(x)


@piece(frozen={"a": "index that may differ between its channels"})
def messages_by_channel(x: Tensor) -> Tensor:
    """Frozen: each channel sends to other places, which the code names for eight channels."""
    to = torch.arange(128).view(1, 8, 16).remainder(7).expand(len(x), -1, -1)
    return torch.zeros_like(x).flatten(2).scatter_add(2, to, x.flatten(2)).view_as(x)


@piece(exact={"a": 8})
def some_samples(x: Tensor) -> Tensor:
    """Exact: some of the samples take another way (a mixture of experts), and are put back."""
    chosen = torch.arange(len(x)) % 2 == 0
    y = torch.zeros_like(x)
    y[chosen] += x[chosen].tanh()
    y.index_add_(0, (~chosen).nonzero()[:, 0], x[~chosen])
    return y


@piece(frozen={"a": "sort|no rule|position"})
def sorted_channels(x: Tensor) -> Tensor:
    """Frozen: a channel's place depends on the others' values."""
    return x.sort(1).values


@piece(frozen={"a": "product of two activations|softmax"})
def gram(x: Tensor) -> Tensor:
    """Frozen: channels attend to one another."""
    f = x.flatten(2)
    return ((f @ f.transpose(1, 2)).softmax(2) @ f).view_as(x)


@piece(frozen={"a": "rule|over its channels"})
def fourier_over_channels(x: Tensor) -> Tensor:
    """Frozen: every frequency holds all channels."""
    return torch.fft.fft(x, dim=1).abs()


@piece(exact={"a": 8}, otherwise=({}, {"a": "fft.*no rule"}))
def fourier_over_space(x: Tensor) -> Tensor:
    """Exact (each channel by itself), or frozen for want of a rule."""
    return torch.fft.irfft2(torch.fft.rfft2(x) * (1 + 1j), s=x.shape[2:])


@piece(exact={"a": 8})
def unfolded(x: Tensor) -> Tensor:
    """Exact: patches of each channel by itself."""
    return F.fold(F.unfold(x, 3, padding=1).tanh(), x.shape[2:], 3, padding=1)


@piece(frozen={"a": "reduced over|value is read"})
def control_flow(x: Tensor) -> Tensor:
    """Frozen: which branch runs depends on the channels."""
    return x if x.amax() > 0 else -x


# -- in place, and views into the same tensor -------------------------------------------------


@piece(exact={"a": 8})
def in_place(x: Tensor) -> Tensor:
    """Exact: the same arithmetic, in place."""
    y = (x + 1).mul_(2).add_(0.1)
    y += x
    return y.tanh_()


@piece(exact={"a": 4})
def in_place_on_half(x: Tensor) -> Tensor:
    """Exact: half of the channels are written through a view, so halves go together."""
    x = x.clone()
    x[:, : x.shape[1] // 2].mul_(2).tanh_()
    return x


@piece(exact={"a": 8})
def in_place_on_view(x: Tensor) -> Tensor:
    """Exact: a view of another shape is written."""
    x = x.clone()
    x.flatten(2).mul_(0.5)
    x[:, :, 0] = 0
    return x


@piece(exact={"a": 4}, otherwise=({}, {"a": ""}))
def copy_into_views(x: Tensor) -> Tensor:
    """Exact with halves together, or frozen: a new tensor is filled through views of it."""
    out, half = torch.empty_like(x), x.shape[1] // 2
    out[:, :half] = x[:, half:]
    out[:, half:] = x[:, :half].tanh()
    return out


@piece(exact={"a": 8}, otherwise=({}, {"a": ""}))
def fill_by_channel(x: Tensor) -> Tensor:
    """Exact, or frozen: zeros, to which each channel is added through a view."""
    out = torch.zeros_like(x)
    out.view(len(x), x.shape[1], -1).add_(x.flatten(2))
    return out


@piece(exact={"a": 8})
def masked(x: Tensor) -> Tensor:
    """Exact: pointwise, with a mask computed from each value."""
    return torch.where(x > 0, x, 0.1 * x).masked_fill(x.abs() > 2, 2.0)
