"""Pieces of random networks that read sequences: attention in many forms, recurrence, mixing of steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import Place, activation, kind
from random_layers import Piece
from torch import Tensor, nn


def causal(steps: int) -> Tensor:
    """Return the mask of what a step may not look at."""
    return torch.triu(torch.ones(steps, steps, dtype=torch.bool), 1)


@kind("sequence", often=2)
class MultiheadAttention(Piece):
    """Torch's attention: over the steps or over memory, with a mask, with the batch first or second."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        heads, self.batch_first = place.divisor(place.width), place.pick(True, True, False)
        self.memory = place.mix(place.width, place.new()) if place.pick(True, False, False) else None
        other = self.memory.out_features if isinstance(self.memory, nn.Linear) else None
        self.attention = nn.MultiheadAttention(
            place.width, heads, kdim=other, vdim=other, batch_first=self.batch_first, bias=place.pick(True, False),
            add_bias_kv=place.pick(False, False, True),
        )  # fmt: skip
        self.masked, self.residual, self.weights = (place.pick(True, False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        memory = y if self.memory is None else self.memory(y)
        mask = causal(x.shape[1]) if self.masked else None
        y, _ = self.attention(y, memory, memory, attn_mask=mask, need_weights=self.weights)
        y = y if self.batch_first else y.transpose(0, 1)
        return x + y if self.residual else y


@kind("sequence", often=2)
class PackedAttention(Piece):
    """Queries, keys and values of one layer, taken apart in several ways."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.heads, self.size = place.pick(1, 2, 3, 4), place.pick(2, 4)
        self.qkv = nn.Linear(place.width, 3 * self.heads * self.size, bias=place.pick(True, False))
        self.out = nn.Linear(self.heads * self.size, place.width)
        self.how, self.count = place.pick("unbind", "chunk", "per head", "split"), place.pick("heads", "size")
        self.fused = place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x)
        heads, size = (self.heads, -1) if self.count == "heads" else (-1, self.size)
        if self.how == "unbind":
            q, k, v = qkv.view(b, t, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.how == "per head":
            q, k, v = qkv.view(b, t, heads, 3 * self.size).transpose(1, 2).chunk(3, -1)
        elif self.how == "chunk":
            q, k, v = (y.view(b, t, heads, size).transpose(1, 2) for y in qkv.chunk(3, -1))
        else:
            sizes = [self.heads * self.size] * 3
            q, k, v = (y.unflatten(2, (heads, size)).transpose(1, 2) for y in qkv.split(sizes, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


def rotated(x: Tensor) -> Tensor:
    """Turn pairs of a head's features by an angle for each step."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.arange(1, half + 1, dtype=x.dtype) * 0.1
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@kind("sequence", often=2)
class GroupedAttention(Piece):
    """Several queries for each key and value; with rotary embeddings, norms of queries and keys, a bias per head."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.groups, self.per, self.size = place.pick(1, 2, 3), place.pick(1, 2), 4
        heads = self.groups * self.per
        self.q, self.out = nn.Linear(place.width, heads * self.size), nn.Linear(heads * self.size, place.width)
        self.k, self.v = (nn.Linear(place.width, self.groups * self.size) for _ in range(2))
        self.norm = nn.LayerNorm(self.size) if place.pick(True, False) else nn.Identity()
        self.rotary, self.causal, self.how = place.pick(True, False), place.pick(True, False), place.pick(0, 1, 2)
        self.bias = nn.Parameter(torch.empty(heads, 1, 1)) if place.pick(True, False, False) else None
        self.sink = nn.Parameter(torch.empty(1, 1, place.width)) if place.pick(True, False, False) else None

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = x if self.sink is None else torch.cat([self.sink.expand(b, -1, -1), x], 1)
        q = self.norm(self.q(x).view(b, t, -1, self.size).transpose(1, 2))
        k = self.norm(self.k(y).view(b, y.shape[1], -1, self.size).transpose(1, 2))
        v = self.v(y).view(b, y.shape[1], -1, self.size).transpose(1, 2)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        if self.how == 0:
            k, v = k.repeat_interleave(self.per, 1), v.repeat_interleave(self.per, 1)
        elif self.how == 1:
            shape = (b, k.shape[1], self.per, k.shape[2], self.size)
            k, v = (z[:, :, None].expand(shape).flatten(1, 2) for z in (k, v))
        mask = torch.zeros(t, y.shape[1], dtype=x.dtype)
        if self.causal and self.sink is None:
            mask = mask.masked_fill(causal(t), -torch.inf)
        if self.bias is not None:
            mask = mask + self.bias
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.how == 2)
        return x + self.out(y.transpose(1, 2).flatten(2))


@kind("sequence")
class PlainAttention(Piece):
    """One head, written out: queries and keys are summed over; or linear attention, without a softmax."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        hidden = place.new()
        self.q, self.k, self.v = (nn.Linear(place.width, hidden) for _ in range(3))
        self.linear, self.out = place.pick(True, False), nn.Linear(hidden, place.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.linear:
            return self.out(F.elu(q) @ (k.softmax(1).transpose(1, 2) @ v))
        return self.out((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)


@kind("sequence", often=1.5, chance="training")
def Encoder(place: Place) -> nn.Module:
    """Torch's encoder layer, or a stack of two."""
    layer = nn.TransformerEncoderLayer(
        place.width, place.divisor(place.width), place.new(), place.pick(0.0, 0.1), place.pick("relu", "gelu"),
        batch_first=True, norm_first=place.pick(True, False),
    )  # fmt: skip
    return layer if place.pick(True, True, False) else nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@kind("sequence")
class Decoder(Piece):
    """Torch's decoder layer, whose memory is the sequence itself or is learned."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer = nn.TransformerDecoderLayer(place.width, place.divisor(place.width), 8, 0.0, batch_first=True)
        self.memory = nn.Parameter(torch.empty(1, 3, place.width)) if place.pick(True, False) else None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1) if self.memory is None else self.memory.expand(len(x), -1, -1))


@kind("sequence", often=3)
class Recurrent(Piece):
    """LSTM, GRU or RNN: layers, directions, projections; the outputs, the states, or both are read."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        make, both, layers = place.pick(nn.LSTM, nn.GRU, nn.RNN), place.pick(True, False), place.pick(1, 1, 2)
        project = {"proj_size": 2} if make is nn.LSTM and place.pick(*[False] * 5, True) else {}
        self.batch_first, self.how = place.pick(True, True, False), place.pick("out", "state", "both")
        self.rnn = make(
            place.width, place.new(), layers, bidirectional=both, batch_first=self.batch_first,
            bias=place.pick(True, True, False), **project,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(x if self.batch_first else x.transpose(0, 1))
        out = out if self.batch_first else out.transpose(0, 1)
        h = state[0] if isinstance(state, tuple) else state
        if self.how == "out":
            return out
        h = h.transpose(0, 1).flatten(1)[:, None]
        return (
            h.expand(-1, x.shape[1], -1) if self.how == "state" else torch.cat([out, h.expand(*out.shape[:2], -1)], 2)
        )


@kind("sequence")
class Cells(Piece):
    """A cell that a loop over the steps calls."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.cell = place.pick(nn.LSTMCell, nn.GRUCell, nn.RNNCell)(place.width, place.new())
        self.given = place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        state, found = None, []
        if self.given:
            zeros = x.new_zeros(len(x), self.cell.hidden_size)
            state = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros
        for step in x.unbind(1):
            state = self.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)


@kind("sequence")
class MixSteps(Piece):
    """A layer over the steps, as in MLP-Mixer, or a convolution along them."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        steps, self.how = place.x.shape[1], place.pick("mixer", "conv", "depthwise", "einsum")
        if self.how in ("mixer", "einsum"):
            self.up, self.act, self.down = nn.Linear(steps, 6), activation(place), nn.Linear(6, steps)
        else:
            groups = place.width if self.how == "depthwise" else 1
            self.conv = nn.Conv1d(place.width, place.width, 3, padding=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mixer":
            return x + self.down(self.act(self.up(x.transpose(1, 2)))).transpose(1, 2)
        if self.how == "einsum":
            return torch.einsum("btc,st->bsc", x, self.down.weight @ self.up.weight)
        return self.conv(x.mT)[..., : x.shape[1]].mT


@kind("sequence")
class Positions(Piece):
    """Something that depends on the step: a table, sines, or a token put in front."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("table", "embedding", "sines", "token")
        self.table = nn.Parameter(torch.empty(1, 64, place.width))
        self.embedding = nn.Embedding(64, place.width)

    def forward(self, x: Tensor) -> Tensor:
        t, c = x.shape[1:]
        if self.how == "table":
            return x + self.table[:, :t]
        if self.how == "embedding":
            return x + self.embedding(torch.arange(t))
        if self.how == "sines":
            return x + (torch.arange(t, dtype=x.dtype)[:, None] * torch.arange(1, c + 1, dtype=x.dtype)).sin()
        token = self.table[:, :1].expand(len(x), -1, -1)
        return torch.cat([token, x], 1)[:, :t]


@kind("sequence")
class OverSteps(Piece):
    """Something taken over the steps, or along them."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.how = place.pick("cumsum", "shift", "flip", "softmax", "last", "pairs", "pool", "flat rows")
        self.layer = nn.Linear(place.width, place.width)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "cumsum":
                return x.cumsum(1) * 0.3
            case "shift":
                return x + F.pad(x, (0, 0, 1, 0))[:, :-1]
            case "flip":
                return torch.cat([x, x.flip(1)], -1)
            case "softmax":
                return x * x.softmax(1)
            case "last":
                return x - x[:, -1:]
            case "pairs":
                return torch.cat([x[:, ::2], x[:, 1::2]], 1)
            case "pool":
                return x + F.avg_pool1d(x.mT, 3, 1, 1).mT
            case _:
                return self.layer(x.reshape(-1, x.shape[-1])).view(x.shape[0], -1, x.shape[2])
