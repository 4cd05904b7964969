"""Stacks of weights in one parameter: ensembles, weights per head, experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.adversarial_checks import check_life


class PerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.w, self.o = nn.Linear(6, 12), nn.Parameter(torch.randn(4, 12, 5)), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(torch.einsum("bld,hde->blhe", self.i(x), self.w).flatten(2)))


class PerHeadByProduct(PerHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu((self.i(x)[:, None] @ self.w).transpose(1, 2).flatten(2)))


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(3, 6, 16)), nn.Parameter(torch.randn(3, 1, 16))
        self.w2 = nn.Parameter(torch.randn(3, 16, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.baddbmm(self.b1, x.expand(3, -1, -1), self.w1).relu()
        return torch.bmm(h, self.w2).transpose(0, 1)


class EnsembleByEinsum(Ensemble):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,eih->enh", x, self.w1).add(self.b1).relu()
        return torch.einsum("enh,eho->neo", h, self.w2)


class EnsembleFromTheLeft(Ensemble):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.w1.transpose(1, 2) @ x.t() + self.b1.transpose(1, 2))
        return (self.w2.transpose(1, 2) @ h).permute(2, 0, 1)


class DeepEnsemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.b = nn.Linear(6, 7), nn.Parameter(torch.randn(3, 1, 10))
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 7, 16)), nn.Parameter(torch.randn(3, 16, 10))
        self.w3 = nn.Parameter(torch.randn(3, 10, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x).tanh().expand(3, -1, -1)
        h = torch.baddbmm(self.b, (h @ self.w1).relu(), self.w2 * 0.5)
        return (h.relu() @ self.w3).mean(0)


class Experts(nn.Module):
    """All experts run, and a softmax weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.w1 = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 16))
        self.w2 = nn.Parameter(torch.randn(4, 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("bd,edh->beh", x, self.w1))
        return torch.einsum("ben,be->bn", torch.einsum("beh,ehn->ben", h, self.w2), self.g(x).softmax(-1))


class GatedExperts(nn.Module):
    """The two halves of one stack make a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.g, self.o = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(9, 2)
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 9, 16)), nn.Parameter(torch.randn(4, 8, 9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        a, b = torch.bmm(x.expand(4, -1, -1), self.w1).chunk(2, -1)
        weights = self.g(x).softmax(-1).t()[..., None]
        return self.o((torch.bmm(a.sigmoid() * b, self.w2) * weights).sum(0))


class ExpertsInALoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(6, 9), nn.Linear(9, 2)
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 16, 9)), nn.Parameter(torch.randn(4, 9, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        return self.o(sum(F.linear(F.relu(F.linear(x, self.w1[e])), self.w2[e]) for e in range(4)))


class ExpertsThatAreGathered(ExpertsInALoop):
    """Each sample gathers the weights of its expert, as in batched products of mixtures."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        chosen = torch.arange(len(x)) % 4
        h = torch.bmm(self.w1[chosen], x[..., None]).relu()
        return self.o(torch.bmm(self.w2[chosen], h)[..., 0])


class EachItsPart(nn.Module):
    """Every member of the stack reads its own part of one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.w, self.o = nn.Linear(6, 12), nn.Parameter(torch.randn(4, 3, 5)), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x).unflatten(-1, (4, 3)).transpose(0, 1)
        return self.o(torch.bmm(h, self.w).transpose(0, 1).flatten(1).relu())


class TiedEnsemble(Ensemble):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x.expand(3, -1, -1), self.w1).relu(), self.w1.transpose(1, 2)).transpose(0, 1)


class OneAddedToAll(Ensemble):
    """What is added has entries of the members, so that they cannot be told apart from units."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.baddbmm(self.b1[..., :1], x.expand(3, -1, -1), self.w1)
        return torch.bmm(h.softmax(-1), self.w2).transpose(0, 1)


EXACT: dict[type[nn.Module], tuple[tuple[int, ...], list[int]]] = {
    PerHead: ((2, 5, 6), [12, 5]),
    PerHeadByProduct: ((2, 5, 6), [12, 5]),
    Ensemble: ((5, 6), [16]),
    EnsembleByEinsum: ((5, 6), [16]),
    EnsembleFromTheLeft: ((5, 6), [16]),
    DeepEnsemble: ((5, 6), [7, 16, 10]),
    Experts: ((5, 6), [16]),
    GatedExperts: ((5, 6), [9, 8, 9]),
    ExpertsInALoop: ((5, 6), [9, 16, 9]),
    ExpertsThatAreGathered: ((5, 6), [9, 16, 9]),
    EachItsPart: ((5, 6), [5]),
}
FROZEN: dict[type[nn.Module], str] = {TiedEnsemble: "both produces and consumes", OneAddedToAll: "softmax"}


@pytest.mark.parametrize("kind", EXACT)
def test_exact(kind: type[nn.Module], tmp_path: Path) -> None:
    shape, units = EXACT[kind]
    traced = pn.trace(kind(), (torch.randn(shape),))
    assert [u.size for u in traced.sites.values()] == units
    check_life(kind, (torch.randn(shape),), tmp_path)


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen(kind: type[nn.Module]) -> None:
    with pytest.raises(pn.PlasticError, match=f"nothing to gate.*w1: .*{FROZEN[kind]}"):
        pn.PlasticNet(kind(), (torch.randn(5, 6),))


def test_multiplications_are_counted() -> None:
    net = pn.PlasticNet(GatedExperts(), (torch.randn(5, 6),))
    assert net.summary().macs == 6 * 9 + 9 * 4 + 4 * 9 * 16 + 4 * 8 * 9 + 9 * 2
