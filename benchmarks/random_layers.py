"""Pieces of random networks that can stand in every domain: mixing, gating, norms, and what must be frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import ANY, CONDITION, Place, activation, kind, run
from torch import Tensor, nn


class Piece(nn.Module):
    """A piece that remembers its axis of channels."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.axis = place.axis
        self.others = place.others


@kind(*ANY, often=3)
class Layer(Piece):
    """A layer that mixes channels, and an activation."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer = place.mix(place.width, place.new(), bias=place.pick(True, True, False))
        self.act = activation(place)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


@kind(*ANY, often=2)
def Bottleneck(place: Place) -> nn.Module:
    """A plain Sequential of two layers."""
    hidden = place.new()
    return nn.Sequential(place.mix(place.width, hidden), activation(place), place.mix(hidden, place.new()))


@kind(*ANY, inner=1, often=4)
class Residual(Piece):
    """A residual sum around other pieces."""

    conditional = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.inner = place.chains[0](place.x)
        width = run(self.inner, place.x).shape[place.axis]
        self.back = place.mix(width, place.width)
        self.scale = nn.Parameter(place.per_channel(torch.ones(place.width))) if place.pick(True, False) else None

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        y = self.back(self.inner(x, c))
        return x + (y if self.scale is None else y * self.scale)


@kind(*ANY, inner=1, often=2)
class Dense(Piece):
    """What other pieces give is put beside what they read, as in DenseNet."""

    conditional = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.inner = place.chains[0](place.x)
        self.swap = place.pick(True, False)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        y = self.inner(x, c)
        return torch.cat([y, x] if self.swap else [x, y], self.axis)


@kind(*ANY, inner=2, often=2)
class Branches(Piece):
    """Two branches, which are added, multiplied, stacked or put side by side."""

    conditional = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("sum", "product", "cat", "stack", "max")
        self.a, self.b = place.chains[0](place.x), place.chains[1](place.x)
        wide, other = (run(m, place.x).shape[place.axis] for m in (self.a, self.b))
        self.fit = nn.Identity() if self.how == "cat" else place.mix(other, wide)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = self.a(x, c), self.fit(self.b(x, c))
        match self.how:
            case "sum":
                return a + b
            case "product":
                return a * b.sigmoid()
            case "cat":
                return torch.cat([a, b], self.axis)
            case "stack":
                return torch.stack([a, b]).mean(0)
            case _:
                return torch.maximum(a, b)


class Block(Piece):
    """A residual block; ``blocks=`` can skip it."""

    def __init__(self, place: Place, hidden: int, norm: bool) -> None:
        super().__init__(place)
        self.up, self.act = place.mix(place.width, hidden), activation(place)
        self.norm = nn.LayerNorm(place.width) if norm and not place.first else nn.Identity()
        self.down = place.mix(hidden, place.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


@kind(*ANY, often=3)
class Blocks(Piece):
    """A list of residual blocks, which a loop runs."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        hidden, norm = place.new(), place.pick(True, False)
        self.blocks = nn.ModuleList(Block(place, hidden, norm) for _ in range(place.pick(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@kind(*ANY)
class Shared(Piece):
    """One layer that is called twice, the second time on its own output."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer, self.act = place.mix(place.width, place.width), activation(place)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.act(self.layer(x)))


@kind(*ANY, inner=1)
class SharedChain(Piece):
    """Other pieces that are called twice, on different inputs."""

    conditional = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.inner = place.chains[0](place.x)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return self.inner(x, c) + self.inner(-x, c)


@kind(*ANY)
class Glu(Piece):
    """A gated linear unit."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer = place.mix(place.width, 2 * place.new())

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.layer(x), self.axis)


@kind(*ANY)
class SwiGlu(Piece):
    """A gate, a value and a way down, as in Llama."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        hidden = place.new()
        self.gate, self.up = place.mix(place.width, hidden, bias=False), place.mix(place.width, hidden, bias=False)
        self.down = place.mix(hidden, place.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@kind(*ANY)
class Chunks(Piece):
    """Two or three chunks of one layer's output, which meet again."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.n, hidden = place.pick(2, 3), place.new()
        self.layer, self.again = place.mix(place.width, self.n * hidden), place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        a, *rest = self.layer(x).chunk(self.n, self.axis)
        if self.again:
            return torch.cat([*rest, a.tanh()], self.axis)
        return a * sum(r.sigmoid() for r in rest)


@kind(*ANY)
class Splits(Piece):
    """Pieces of unequal length, whose sizes are an attribute or are written in the code."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.sizes = [place.new(), place.new() + 1]
        self.layer = place.mix(place.width, sum(self.sizes))
        self.a, self.b = place.mix(self.sizes[0], 4), place.mix(self.sizes[1], 4)
        self.own = place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x).split(self.sizes, self.axis)
        return self.a(a) + self.b(b) if self.own else torch.cat([b.tanh(), a], self.axis)


@kind(*ANY)
class SqueezeExcite(Piece):
    """A gate on every channel, from the mean over all else."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        hidden = place.pick(2, 4)
        self.down, self.up = place.mix(place.width, hidden), place.mix(hidden, place.width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(self.others, keepdim=True) if self.others else x
        return x * self.up(self.down(pooled).relu()).sigmoid()


@kind(*ANY)
class Affine(Piece):
    """A scale and a shift, as parameters or as buffers, some of which no state dict holds."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        shape = place.per_channel(torch.ones(place.width)).shape
        self.shift = nn.Parameter(torch.zeros(shape))
        if place.pick(True, False):
            self.register_buffer("scale", torch.rand(shape) + 0.5, persistent=place.pick(True, False))
        else:
            self.scale = nn.Parameter(torch.ones(shape), requires_grad=place.pick(True, False))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@kind(*ANY)
class Modulated(Piece):
    """Scale and shift from a second input, if there is one (FiLM)."""

    conditional = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.hidden, self.out = nn.Linear(CONDITION, 6), nn.Linear(6, 2 * place.width)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        if c is None:
            return x
        scale, shift = self.out(self.hidden(c).tanh()).chunk(2, -1)
        shape = (len(x), -1, *[1] * (x.dim() - 2)) if self.axis == 1 else (len(x), *[1] * (x.dim() - 2), scale.shape[1])
        return x * (1 + scale.view(shape)) + shift.view(shape)


@kind(*ANY)
class Experts(Piece):
    """Two experts, weighted by a softmax over them."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        hidden = place.new()
        self.router = place.mix(place.width, 2)
        self.a, self.b = place.mix(place.width, hidden), place.mix(place.width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.router(x).softmax(self.axis).split(1, self.axis)
        return p * self.a(x).tanh() + q * self.b(x).relu()


@kind(*ANY)
class Maxout(Piece):
    """The larger one of two layers that are packed into one."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer, self.outer = place.mix(place.width, 2 * place.new()), place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        axis = self.axis % x.dim()
        pairs = self.layer(x).unflatten(axis, (2, -1) if self.outer else (-1, 2))
        return pairs.amax(axis if self.outer else axis + 1)
