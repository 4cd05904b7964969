"""Inner products of two activations: the units that are summed over go in pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.adversarial_checks import check_life


class Attention(nn.Module):
    """One head, with scores that are not scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 16), nn.Linear(6, 16)
        self.v, self.o = nn.Linear(6, 12), nn.Linear(12, 3)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.scores(self.query(x), self.key(x)).softmax(-1) @ self.v(x))


class ScaledByANumber(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bid,bjd->bij", q * 16**-0.5, k)


class ScaledByItsWidth(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) / q.shape[-1] ** 0.5


class ScaledByAnAttribute(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.width = 16

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) / self.width**0.5


class Normalised(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(F.normalize(q, dim=-1), F.normalize(k, dim=-1))


class Exponential(Attention):
    """Neither is zero where a parameter is."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q.exp(), k.cos())


class OneIsExponential(Attention):
    """One of the two is zero where its parameters are, which is enough."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q.exp(), k.relu())


class Fused(nn.Module):
    """Queries, keys and values of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.o((q @ k.transpose(1, 2)).sigmoid() @ v)


class NonLocal(nn.Module):
    """A non-local block, as of SAGAN, with batch norms before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.f, self.g, self.h = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1, bias=False), nn.Conv2d(8, 6, 1)
        self.v, self.last, self.gamma = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 2, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        f, g, h = (layer(x).flatten(2) for layer in (self.f, self.g, self.h))
        mixed = h @ torch.bmm(f.transpose(1, 2), g).softmax(1)
        return self.last(x + self.gamma * self.v(mixed.view(*mixed.shape[:2], *x.shape[2:])))


class BehindDepthwise(Attention):
    """Queries and keys pass a depthwise convolution each, as the inputs of state spaces do."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=1, groups=16) for _ in range(2))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = (F.silu(c(t.transpose(1, 2))).transpose(1, 2) for c, t in zip(self.convolutions, (q, k), strict=True))
        return super().scores(q, k)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.i = nn.Linear(6, 16), nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 16))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.u(a).relu() * self.i(b)).sum(-1, keepdim=True)


class AllPairs(Towers):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.u(a) @ self.i(b).t()


class AlsoRead(Towers):
    def __init__(self) -> None:
        super().__init__()
        self.also = nn.Linear(16, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u = self.u(a)
        return (u * self.i(b)).sum(-1, keepdim=True) + self.also(u.exp())


class Sum(nn.Module):
    """The units are added up, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).tanh().sum(-1, keepdim=True)


class Mean(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).tanh().mean(-1, keepdim=True)


TOKENS, TWO = ((2, 5, 6),), ((4, 6), (4, 5))
CASES: list[tuple[type[nn.Module], tuple[tuple[int, ...], ...], dict[str, int], dict[str, str]]] = [
    (Attention, TOKENS, {"query": 16, "v": 12}, {}),
    (ScaledByANumber, TOKENS, {"query": 16, "v": 12}, {}),
    (ScaledByItsWidth, TOKENS, {"v": 12}, {"query": "uses its width in a way that tracing cannot see"}),
    (ScaledByAnAttribute, TOKENS, {"query": 16, "v": 12}, {}),
    (Normalised, TOKENS, {"v": 12}, {"query": "reduced over its channels"}),
    (Exponential, TOKENS, {"v": 12}, {"query": "none is zero where a parameter is"}),
    (OneIsExponential, TOKENS, {"query": 16, "v": 12}, {}),
    (BehindDepthwise, TOKENS, {"query": 16, "v": 12}, {}),
    (Fused, TOKENS, {"qkv": 8}, {}),
    (NonLocal, ((2, 3, 3, 3),), {"first": 8, "f": 5, "h": 6}, {}),
    (Towers, TWO, {"u": 16, "i.0": 9}, {}),
    (AllPairs, TWO, {"u": 16, "i.0": 9}, {}),
    (AlsoRead, TWO, {"u": 16, "i.0": 9}, {}),
    (Sum, ((4, 6),), {"a": 7, "b": 5}, {}),
    (Mean, ((4, 6),), {"a": 7}, {"b": "reduced over its channels"}),
]


@pytest.mark.parametrize(("kind", "shapes", "sites", "frozen"), CASES, ids=[case[0].__name__ for case in CASES])
def test_units_that_are_summed_over(
    kind: type[nn.Module],
    shapes: tuple[tuple[int, ...], ...],
    sites: dict[str, int],
    frozen: dict[str, str],
    tmp_path: Path,
) -> None:
    x = tuple(torch.randn(shape) for shape in shapes)
    net = pn.PlasticNet(kind(), x)
    assert {n: len(s) for n, s in net.sites.items()} == sites, dict(net.frozen)
    assert all(reason in net.frozen[name] for name, reason in frozen.items()), dict(net.frozen)
    check_life(kind, x, tmp_path)


def test_pairs_are_gated_per_batch() -> None:
    net = pn.PlasticNet(Attention(), (torch.randn(2, 5, 6),))
    assert net.gating.per_sample == {"query": False, "v": True}
