"""Kinds of soak_networks.py that read sequences without attention: recurrence, scans, graphs, and sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_kinds import Place
from soak_kinds import SIDE, STEPS, kind
from torch import Tensor, nn


@kind("sequence")
class GruAttention(nn.Module):
    """A GRU, whose last state asks all its outputs."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.gru = nn.GRU(place.width, middle, batch_first=True)
        self.ask = nn.Linear(middle, middle)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, and beside each what was found."""
        y, h = self.gru(x)
        near = (y @ self.ask(h[-1]).unsqueeze(-1)).softmax(1)
        found = (near * y).sum(1, keepdim=True)
        return torch.cat((y, found.expand_as(y)), -1)


@kind("sequence")
class StartedLstm(nn.Module):
    """An LSTM that begins with a state that the third input gives, in both directions."""

    needs = ("side",)

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.state = nn.Linear(SIDE, 4 * middle)
        self.lstm = nn.LSTM(place.width, middle, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """Return the outputs."""
        h, c = self.state(side).tanh().view(len(x), 2, 2, -1).permute(1, 2, 0, 3)
        return self.lstm(x, (h.contiguous(), c.contiguous()))[0]


@kind("sequence")
class SpatialGating(nn.Module):
    """One half of the channels is mixed over the steps, and multiplies the other, as in gMLP."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.up, self.down = nn.Linear(place.width, 2 * middle), nn.Linear(middle, place.width)
        self.norm, self.mix = nn.LayerNorm(middle), nn.Linear(STEPS, STEPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        u, v = F.gelu(self.up(x)).chunk(2, dim=-1)
        return x + self.down(u * self.mix(self.norm(v).transpose(1, 2)).transpose(1, 2))


@kind("sequence")
class Conformer(nn.Module):
    """The convolution of a Conformer: a gated layer, a depthwise convolution, a batch norm."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.up, self.down = nn.Conv1d(place.width, 2 * middle, 1), nn.Conv1d(middle, place.width, 1)
        self.depthwise = nn.Conv1d(middle, middle, 3, padding=1, groups=middle)
        self.norm = nn.BatchNorm1d(middle)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        y = F.glu(self.up(x.transpose(1, 2)), dim=1)
        return x + self.down(F.silu(self.norm(self.depthwise(y)))).transpose(1, 2)


@kind("sequence")
class Fourier(nn.Module):
    """The real part of a Fourier transform over the steps, as in FNet, and a layer."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(place.width, place.new()), nn.Identity()
        self.out = nn.Linear(self.first.out_features, place.new())

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer of the mixed steps."""
        x = self.first(x)
        return self.out(x + torch.fft.fft(x, dim=1).real)


@kind("sequence")
class Scan(nn.Module):
    """A state for each channel, which decays, and by how much the input says (a selective scan)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.x, self.z, self.dt = (nn.Linear(place.width, middle) for _ in range(3))
        self.log_a, self.d = nn.Parameter(torch.zeros(middle, 3)), nn.Parameter(torch.ones(middle))
        self.b, self.c = nn.Linear(place.width, 3), nn.Linear(place.width, 3)
        self.out = nn.Linear(middle, place.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer of what the states gave."""
        u, dt, b, c = self.x(x), F.softplus(self.dt(x)), self.b(x), self.c(x)
        decay = torch.exp(-dt.unsqueeze(-1) * self.log_a.exp())
        new = (dt * u).unsqueeze(-1) * b.unsqueeze(2)
        state, found = torch.zeros_like(new[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + new[:, t]
            found.append((state * c[:, t].unsqueeze(1)).sum(-1))
        y = torch.stack(found, dim=1) + u * self.d
        return self.out(y * F.silu(self.z(x)))


@kind("sequence")
class QuasiRecurrent(nn.Module):
    """Gates by a causal convolution, and a running mixture."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.conv = nn.Conv1d(place.width, 3 * place.new(), 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        z, f, o = self.conv(F.pad(x.transpose(1, 2), (1, 0))).chunk(3, dim=1)
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        state, found = torch.zeros_like(z[..., 0]), []
        for t in range(z.shape[-1]):
            state = f[..., t] * state + (1 - f[..., t]) * z[..., t]
            found.append(o[..., t] * state)
        return torch.stack(found, 1)


@kind("sequence")
class Messages(nn.Module):
    """Messages along the edges of a graph, added up where they arrive, by index_add or scatter_add."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.message, self.own = nn.Linear(2 * place.width, place.new()), nn.Identity()
        self.own = nn.Linear(place.width, self.message.out_features)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]]))
        self.how = place.pick("index_add", "scatter_add", "scatter_mean")

    def forward(self, x: Tensor) -> Tensor:
        """Return the nodes."""
        a, b = self.edges
        m = self.message(torch.cat([x[:, a], x[:, b]], dim=-1)).relu()
        y = self.own(x)
        if self.how == "index_add":
            return y.index_add(1, b, m)
        index = b.view(1, -1, 1).expand_as(m)
        if self.how == "scatter_add":
            return y.scatter_add(1, index, m)
        return y.scatter_reduce(1, index, m, "mean")


@kind("sequence")
class Pairs(nn.Module):
    """Something for every pair of steps, from a sum of both, over which the largest or the mean is taken."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.a, self.b, self.out = nn.Linear(place.width, middle), nn.Linear(place.width, middle), nn.Linear(middle, 6)
        self.largest = place.pick(True, False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the steps."""
        pairs = self.out((self.a(x).unsqueeze(2) + self.b(x).unsqueeze(1)).relu())
        return pairs.amax(2) if self.largest else pairs.mean(2)


@kind("sequence")
class Points(nn.Module):
    """Every step on its own, and beside it the largest of all, as in PointNet."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.a, self.norm, self.b = nn.Linear(place.width, middle), nn.BatchNorm1d(middle), nn.Linear(2 * middle, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the steps."""
        x = self.norm(self.a(x).mT).mT.relu()
        return self.b(torch.cat([x, x.max(dim=1, keepdim=True).values.expand(-1, x.shape[1], -1)], -1))


@kind("sequence")
class TokenShift(nn.Module):
    """Each channel mixes its step with the one before, by a share of its own, as in RWKV."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        middle = place.new()
        self.mu_k, self.mu_r = nn.Parameter(torch.rand(place.width)), nn.Parameter(torch.rand(place.width))
        self.k, self.r = nn.Linear(place.width, middle, bias=False), nn.Linear(place.width, place.width, bias=False)
        self.v = nn.Linear(middle, place.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        before = F.pad(x, (0, 0, 1, -1))
        k = self.k(torch.lerp(before, x, self.mu_k)).relu().square()
        return x + (self.r(x * self.mu_r + before * (1 - self.mu_r))).sigmoid() * self.v(k)
