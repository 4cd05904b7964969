"""Networks on graphs, point clouds and mixtures of experts, written by hand with plain indexing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FROM = torch.tensor([0, 1, 2, 3, 4, 5, 1, 3, 5, 0, 2])
TO = torch.tensor([1, 0, 3, 2, 5, 4, 2, 1, 0, 4, 4])
NODES = 6


def mean_of(messages: Tensor, to: Tensor, nodes: int) -> Tensor:
    """The mean of what each node is sent, with an index that is expanded as PyG does it."""
    index = to[:, None].expand_as(messages)
    total = messages.new_zeros(nodes, messages.shape[1]).scatter_add_(0, index, messages)
    count = messages.new_zeros(nodes).scatter_add_(0, to, messages.new_ones(len(to)))
    return total / count.clamp(min=1)[:, None]


class GCN(nn.Module):
    """Sums over neighbours, divided by the roots of both degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def spread(self, h: Tensor) -> Tensor:
        degree = torch.zeros(len(h)).to(h).index_add_(0, TO, torch.ones(len(TO)).to(h)) + 1
        weight = (degree[FROM] * degree[TO]).rsqrt()
        return torch.zeros_like(h).index_add_(0, TO, h[FROM] * weight[:, None]) + h / degree[:, None]

    def forward(self, x: Tensor) -> Tensor:
        h = self.spread(self.b(self.spread(self.a(x)).relu())).relu()
        return self.c(h.mean(0, keepdim=True))


class SAGE(nn.Module):
    """The mean of neighbours and the node itself, by two layers, and the largest of each graph of two."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = (nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 6)]) for _ in range(2))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for own, other in zip(self.own, self.other, strict=True):
            x = (own(x) + other(mean_of(x[FROM], TO, len(x)))).relu()
        graph = torch.tensor([0, 0, 0, 0, 1, 1])
        pooled = torch.full((2, x.shape[1]), -torch.inf).to(x)
        return self.out(pooled.scatter_reduce(0, graph[:, None].expand_as(x), x, "amax"))


class GIN(nn.Module):
    """Sums of neighbours, and a network of two layers with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(0.1))
        self.a, self.norm, self.b, self.c = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = (1 + self.eps) * x + torch.zeros_like(x).index_put((TO,), x[FROM], accumulate=True)
        h = self.b(self.norm(self.a(x)).relu()).relu()
        return self.c(h + torch.zeros_like(h).index_put_((TO,), h[FROM], accumulate=True))


class GAT(nn.Module):
    """Attention along edges, whose softmax takes the largest score of each node by scatter_reduce."""

    def __init__(self, heads: int = 4, width: int = 3) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.a, self.b, self.c = nn.Linear(4, heads * width), nn.Linear(heads * width, 6), nn.Linear(6, 2)
        self.source, self.target = (nn.Parameter(torch.randn(1, heads, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).view(len(x), self.heads, self.width)
        score = (h * self.source).sum(-1)[FROM] + (h * self.target).sum(-1)[TO]
        score = F.leaky_relu(score, 0.2)
        index = TO[:, None].expand_as(score)
        most = score.new_zeros(len(x), score.shape[1]).scatter_reduce_(0, index, score, "amax", include_self=False)
        share = (score - most[TO]).exp()
        share = share / score.new_zeros(len(x), score.shape[1]).scatter_add_(0, index, share)[TO]
        h = torch.zeros_like(h).index_add_(0, TO, h[FROM] * share[..., None])
        return self.c(self.b(h.flatten(1)).relu())


class EGNN(nn.Module):
    """An equivariant layer: distances go into messages, and messages move the coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.edge, self.message = nn.Linear(4, 8), nn.Linear(17, 10), nn.Linear(10, 7)
        self.shift, self.update, self.out = nn.Linear(7, 1), nn.Linear(15, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        between = where[TO] - where[FROM]
        distance = between.pow(2).sum(1, keepdim=True)
        m = self.message(self.edge(torch.cat([h[TO], h[FROM], distance], 1)).tanh()).tanh()
        where = where + mean_of(between * self.shift(m), TO, len(x))
        got = torch.zeros(len(x), m.shape[1]).to(m).index_add_(0, TO, m)
        h = h + self.update(torch.cat([h, got], 1))
        return self.out(h), where


class EdgeConv(nn.Module):
    """A layer of DGCNN: the nearest points by the products of all pairs, and the largest of their differences."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.a, self.norm, self.b = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(16, 7, 1)
        self.c, self.out = nn.Conv1d(7, 6, 1), nn.Linear(12, 2)

    def nearest(self, x: Tensor) -> Tensor:
        square = x.pow(2).sum(1, keepdim=True)
        return (2 * x.transpose(1, 2) @ x - square - square.transpose(1, 2)).topk(3, dim=-1)[1]

    def pairs(self, x: Tensor, nearest: Tensor) -> Tensor:
        batch, _, points = x.shape
        flat = (nearest + torch.arange(batch).view(-1, 1, 1) * points).view(-1)
        x = x.transpose(1, 2).contiguous()
        others = x.view(batch * points, -1)[flat, :].view(batch, points, 3, -1)
        own = x.view(batch, points, 1, -1).repeat(1, 1, 3, 1)
        return torch.cat((others - own, own), 3).permute(0, 3, 1, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        nearest = self.nearest(x)
        h = F.leaky_relu(self.norm(self.a(self.pairs(x, nearest))), 0.2).max(-1)[0]
        h = self.b(self.pairs(h, self.nearest(h) if self.again else nearest)).max(-1)[0]
        h = self.c(h.tanh())
        return self.out(torch.cat([h.amax(2), h.mean(2)], 1))


class Mixture(nn.Module):
    """Each token goes to the expert of its largest score, and comes back by ``index_add`` or as rows that are set."""

    def __init__(self, by: str = "add") -> None:
        super().__init__()
        self.by = by
        self.inp, self.gate, self.out = nn.Linear(4, 8), nn.Linear(4, 3), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        value, chosen = self.gate(x).softmax(-1).topk(1, -1)
        h = self.inp(x)
        y = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).any(-1).nonzero()[:, 0]
            if len(rows) and self.by == "add":
                y.index_add_(0, rows, expert(h[rows]) * value[rows])
            elif len(rows):
                y[rows] = y[rows] + expert(h[rows]) * value[rows]
        return self.out(h + y)
