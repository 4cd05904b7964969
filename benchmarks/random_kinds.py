"""What the pieces of random networks have in common: their kinds, and the places where they are put.

A piece reads a tensor and gives one. Its kind says in which domains it can stand: ``vector`` (batch, channels),
``sequence`` (batch, steps, channels), ``signal`` (batch, channels, steps), ``image`` and ``volume``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

LAST = ("vector", "sequence")  # the channels are the last axis
FIRST = ("signal", "image", "volume")  # the channels are axis 1
ANY = (*LAST, *FIRST)
CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONDITION = 5  # the width of the second input


@dataclass(frozen=True)
class Kind:
    """A kind of piece.

    Attributes:
        name: The name of its class.
        make: Builds a piece for a `Place`.
        domains: Where it can stand.
        inner: How many chains of other pieces it holds.
        keeps: Whether the extents (steps, height, width) stay, so that it can stand in a branch.
        often: How often it is drawn, relative to the others.
        to: The domain behind it, if it is another one.
        chance: Whether it draws random numbers as it runs: "" (never), "training" or "always".
    """

    name: str
    make: Callable[[Place], nn.Module]
    domains: tuple[str, ...]
    inner: int = 0
    keeps: bool = True
    often: float = 1.0
    to: str = ""
    chance: str = ""


_Made = TypeVar("_Made", bound=Callable[..., nn.Module])


def registering(kinds: dict[str, Kind]) -> Callable[..., Callable[[_Made], _Made]]:
    """Return a decorator with arguments that registers classes of pieces as kinds."""

    def kind(*domains: str, **options: Any) -> Callable[[_Made], _Made]:
        def register(make: _Made) -> _Made:
            kinds[make.__name__] = Kind(make.__name__, make, domains, **options)
            return make

        return register

    return kind


KINDS: dict[str, Kind] = {}
kind = registering(KINDS)


class Place:
    """Where a piece is put.

    Args:
        x: An example of the tensor that it reads.
        domain: The domain of this tensor.
        rng: Random numbers for what the piece decides.
        chains: What builds its inner chains: functions that take an example of what the chain reads.
    """

    def __init__(
        self, x: Tensor, domain: str, rng: Random, chains: Sequence[Callable[[Tensor], nn.Module]] = ()
    ) -> None:
        self.x, self.domain, self.rng, self.chains = x, domain, rng, chains
        self.first = domain in FIRST
        self.axis = 1 if self.first else -1
        self.width = x.shape[self.axis]
        self.rank = x.dim() - 2  # the number of extents
        self.others = tuple(range(2, x.dim())) if self.first else tuple(range(1, x.dim() - 1))

    def new(self) -> int:
        """Draw a number of channels."""
        return self.rng.choice((4, 4, 6, 8, 8, 12))

    def pick(self, *values: Any) -> Any:
        """Draw one of these values."""
        return self.rng.choice(values)

    def mix(self, width: int, out: int, bias: bool = True) -> nn.Module:
        """Return a layer that mixes channels: linear, or a convolution with a kernel of 1."""
        return CONVS[self.rank - 1](width, out, 1, bias=bias) if self.first else nn.Linear(width, out, bias=bias)

    def divisor(self, n: int) -> int:
        """Draw a number from 1 to 4 that divides a width; larger ones are preferred."""
        return self.rng.choice([d for d in (1, 2, 2, 3, 4, 4) if n % d == 0])

    def per_channel(self, values: Tensor) -> Tensor:
        """Return a vector of channels in a shape that broadcasts in this domain."""
        return values.view(-1, *[1] * self.rank) if self.first else values


def run(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a copy of a piece gives in evaluation, to see its shape."""
    with torch.no_grad():
        return copy.deepcopy(module).eval()(x)


def activation(place: Place) -> nn.Module:
    """Draw an activation."""
    makes: tuple[Callable[[], nn.Module], ...] = (
        nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Sigmoid, nn.ELU, nn.Softplus, nn.Hardswish, nn.Identity,
        lambda: nn.LeakyReLU(inplace=True), lambda: nn.ReLU(inplace=True),
    )  # fmt: skip
    return place.rng.choice(makes)()


def randomise(model: nn.Module) -> nn.Module:
    """Give parameters and running statistics random values, so that no zero hides an error, in double precision."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, max(p[0].numel(), 1) ** -0.5)
            elif name.endswith("bias"):
                p.normal_(0, 0.3)
            else:
                p.uniform_(0.5, 1.5)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(0, 0.3)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 1.5)
    return model.double()
