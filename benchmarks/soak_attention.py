"""Kinds of soak_networks.py that attend to steps, to neighbours, to latents, or to another input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import Place
from soak_kinds import SIDE, STEPS, kind
from torch import Tensor, nn


class Heads(nn.Module):
    """Queries, keys and values of two heads, and what they attend to; others say how the scores are made."""

    def __init__(self, place: Place, heads: int = 2) -> None:
        super().__init__()
        self.heads, inner = heads, 4 * heads
        self.q, self.k, self.v = (nn.Linear(place.width, inner) for _ in range(3))
        self.out = nn.Linear(inner, place.new())

    def split(self, x: Tensor) -> Tensor:
        """Return features in heads, shape (batch, heads, steps, features)."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return how well keys fit to queries, before the softmax."""
        return q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return what every step has attended to."""
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        y = self.scores(q, k).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@kind("sequence")
class Alibi(Heads):
    """A slope for each head, by which far steps count less."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        steps = torch.arange(STEPS)
        self.register_buffer("far", (steps[:, None] - steps).abs().float())
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25]).view(2, 1, 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return scores less the distance times the slope."""
        return super().scores(q, k) - self.slopes * self.far


@kind("sequence")
class RelativeBias(Heads):
    """A table of biases, one for each distance and head, as in T5 and Swin."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.table = nn.Embedding(2 * STEPS - 1, 2)
        steps = torch.arange(STEPS)
        self.register_buffer("index", steps[:, None] - steps + STEPS - 1, persistent=False)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return scores with the bias of the distance."""
        return super().scores(q, k) + self.table(self.index).permute(2, 0, 1)


@kind("sequence")
class TalkingHeads(Heads):
    """Layers that mix the heads, before the softmax."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.mix = nn.Linear(2, 2, bias=False)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return mixed scores."""
        return self.mix(super().scores(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@kind("sequence")
class SigmoidHeads(Heads):
    """Scores that do not compete, of queries and keys of unit length, with a temperature for each head."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return logarithms of sigmoids."""
        return F.logsigmoid(self.temperature * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT))


@kind("sequence")
class Latents(nn.Module):
    """A few vectors that are learned read the steps, and the steps read them, as in a Perceiver."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, 8))
        self.steps = nn.Linear(place.width, 8)
        self.read, self.write = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the steps."""
        x = self.steps(x)
        z = self.latents.expand(len(x), -1, -1)
        z = z + self.read(self.norm(z), x, x, need_weights=False)[0]
        return x + self.write(x, z, z, need_weights=False)[0]


@kind("sequence")
class Slots(nn.Module):
    """Slots that compete for the steps, and a cell that moves them, twice."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(2, 6))
        self.k, self.v, self.q = nn.Linear(place.width, 6), nn.Linear(place.width, 6), nn.Linear(6, 6, bias=False)
        self.cell = nn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return for every step the slots by which it was taken."""
        k, v, slots = self.k(x), self.v(x), self.slots.unsqueeze(0).repeat(len(x), 1, 1)
        near = k.new_zeros(())
        for _ in range(2):
            near = torch.einsum("btd,bsd->bts", k, self.q(slots)).softmax(-1)
            seen = torch.einsum("bts,btd->bsd", near / (near.sum(1, keepdim=True) + 1e-3), v)
            slots = self.cell(seen.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return near @ slots


@kind("sequence")
class GatedAttentionUnit(nn.Module):
    """Queries and keys are one layer, scaled and shifted; squares of relu, and no softmax (arXiv 2202.10447)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.u, self.v, self.base = (
            nn.Linear(place.width, middle),
            nn.Linear(place.width, middle),
            nn.Linear(place.width, 6),
        )
        self.gamma, self.beta = nn.Parameter(torch.ones(2, 6)), nn.Parameter(torch.zeros(2, 6))
        self.out = nn.Linear(middle, place.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        u, v = F.silu(self.u(x)), F.silu(self.v(x))
        q, k = (F.silu(self.base(x)).unsqueeze(-2) * self.gamma + self.beta).unbind(-2)
        near = F.relu(q @ k.mT / STEPS).square()
        return x + self.out(u * (near @ v))


@kind("sequence")
class Retention(Heads):
    """No softmax, but a decay for each head."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        far = torch.arange(STEPS)[:, None] - torch.arange(STEPS)
        decay = torch.tensor([0.5, 0.8]).view(2, 1, 1) ** far.clamp(min=0) * (far >= 0)
        self.register_buffer("decay", decay)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum over the steps before."""
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(((q @ k.mT * self.decay) @ v).transpose(1, 2).flatten(2))


@kind("sequence")
class GraphAttention(nn.Module):
    """Nodes that attend to their neighbours only, with scores that are sums (GAT)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.layer = nn.Linear(place.width, place.new(), bias=False)
        out = self.layer.out_features
        self.here, self.there = nn.Parameter(torch.randn(out, 1)), nn.Parameter(torch.randn(out, 1))
        self.register_buffer("joined", torch.eye(STEPS).roll(1, 0) + torch.eye(STEPS) > 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the nodes."""
        x = self.layer(x)
        scores = F.leaky_relu(x @ self.here + (x @ self.there).mT, 0.2)
        return F.elu(scores.masked_fill(~self.joined, float("-inf")).softmax(-1) @ x)


@kind("sequence")
class Parallel(Heads):
    """Attention and a feed-forward part side by side behind one norm, as in PaLM."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        middle = place.new()
        self.norm = nn.LayerNorm(place.width)
        self.out = nn.Linear(8, place.width)
        self.up, self.down = nn.Linear(place.width, middle), nn.Linear(middle, place.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        y = self.norm(x)
        return x + super().forward(y) + self.down(F.gelu(self.up(y)))


@kind("sequence")
class ToSide(nn.Module):
    """The steps attend to some that a layer makes of the third input."""

    needs = ("side",)

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(place.width, 6), nn.Linear(SIDE, 3 * 12), nn.Linear(6, place.width)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """Return the sum."""
        k, v = self.kv(side).unflatten(1, (3, 2, 6)).unbind(2)
        return x + self.out(F.scaled_dot_product_attention(self.q(x), k, v))


@kind("image")
class Axial(nn.Module):
    """Attention along rows, then along columns."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first = place.mix(place.width, 8)
        self.rows, self.columns = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums."""
        x = self.first(x)
        n, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).reshape(n * h, w, c)
        y = (y + self.rows(y, y, y)[0]).view(n, h, w, c).transpose(1, 2).reshape(n * w, h, c)
        y = y + self.columns(y, y, y)[0]
        return y.view(n, w, h, c).permute(0, 3, 2, 1)


@kind("image")
class Windows(nn.Module):
    """Attention within windows that were shifted, as in Swin."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.qkv, self.out, self.bias = (
            nn.Linear(place.width, 24),
            nn.Linear(8, place.width),
            nn.Parameter(torch.randn(2, 4, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        n, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
        y = y.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT * 0.5 + self.bias).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 8)
        y = self.out(y).reshape(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c)
        return x + y.roll((1, 1), (1, 2)).permute(0, 3, 1, 2)
