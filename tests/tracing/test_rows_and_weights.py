"""Networks that move rows by an index, and whose weights are stacked, masked or normalised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import plasticnet as pn
from tests.kit.adversarial_checks import close_units, distance, precise

ROWS = 8
FROM = torch.tensor([0, 1, 2, 3, 4, 5, 1, 3, 5, 0, 2, 7])
TO = torch.tensor([1, 0, 3, 2, 5, 4, 2, 1, 0, 4, 6, 6])


class Mixture(nn.Module):
    """Two of four experts, whose weights are stacked, for each row."""

    def __init__(self, way: Callable[[Mixture, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.i, self.g, self.o = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(10, 3)
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 10, 16)), nn.Parameter(torch.randn(4, 16, 10))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x).tanh()
        weights, chosen = self.g(h).softmax(-1).topk(2, -1)
        return self.o(self.way(self, h, weights, chosen) + h)


def added(m: Mixture, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for e in range(4):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        out.index_add_(0, rows, (h[rows] @ m.w1[e]).relu() @ m.w2[e] * weights[rows, place][:, None])
    return out


def put(m: Mixture, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for e in range(4):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        out[rows] += (h[rows] @ m.w1[e]).relu() @ m.w2[e] * weights[rows, place][:, None]
    return out


def sorted_by_expert(m: Mixture, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    order = chosen.flatten().argsort(stable=True)
    rows = torch.arange(len(h)).repeat_interleave(2)[order]
    parts = h[rows].split(chosen.flatten().bincount(minlength=4).tolist())
    found = torch.cat([(part @ m.w1[e]).relu() @ m.w2[e] for e, part in enumerate(parts)])
    return torch.zeros_like(h).index_add(0, rows, found * weights.flatten()[order][:, None])


def indexed(m: Mixture, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    hidden = torch.einsum("bd,bkdh->bkh", h, m.w1[chosen]).relu()
    return (torch.einsum("bkh,bkhd->bkd", hidden, m.w2[chosen]) * weights[..., None]).sum(1)


def selected(m: Mixture, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    w1, w2 = (w.index_select(0, chosen.flatten()) for w in (m.w1, m.w2))
    rows = torch.arange(len(h)).repeat_interleave(2)
    found = torch.bmm(torch.bmm(h[rows][:, None], w1).relu(), w2)[:, 0]
    return torch.zeros_like(h).index_add(0, rows, found * weights.reshape(-1, 1))


def gathered(m: Mixture, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    index = chosen[:4, 0, None, None]
    w1, w2 = (w.gather(0, index.expand(-1, *w.shape[1:])) for w in (m.w1, m.w2))
    found = torch.bmm(torch.bmm(h[:4, None], w1).relu(), w2)[:, 0] * weights[:4, :1]
    return torch.cat([found, torch.zeros_like(h[4:])])


def all_of_them(m: Mixture, h: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    each = torch.bmm(torch.bmm(h.expand(4, -1, -1), m.w1).relu(), m.w2)
    return (each * torch.zeros(len(h), 4).to(h).scatter(1, chosen, weights).t()[..., None]).sum(0)


class Graph(nn.Module):
    """One layer of a graph network, whose linear layers have weights that are computed."""

    def __init__(self, made: Callable[[nn.Linear], nn.Module], sums: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.own, self.o = map(
            made, (nn.Linear(6, 12), nn.Linear(12, 14), nn.Linear(12, 14), nn.Linear(14, 3))
        )
        self.sums = sums

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.o((self.b(self.sums(torch.zeros_like(h), h[FROM])) + self.own(h)).relu())


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_add": lambda out, h: out.index_add_(0, TO, h),
    "scatter_add": lambda out, h: out.scatter_add(0, TO[:, None].expand_as(h), h),
    "scatter_reduce": lambda out, h: out.scatter_reduce(0, TO[:, None].expand_as(h), h, "amax", include_self=False),
    "index_put": lambda out, h: out.index_put((TO,), h, accumulate=True),
}
LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm": weight_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}


class Masked(nn.Module):
    """The first two weights are masked, and rows are sorted between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 14), nn.Linear(14, 3)
        self.scale = nn.Parameter(torch.ones(12))
        for name in ("a", "b"):
            self.register_buffer(f"mask_{name}", (torch.rand_like(getattr(self, name).weight) > 0.4).float())
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(F.linear(x, self.a.weight * self.mask_a, self.a.bias)) * self.scale
        return self.c(F.linear(h, self.b.weight * self.mask_b, self.b.bias).relu())


class Attention(nn.Module):
    """Queries and keys, whose units go in pairs, are laid out by an index before they meet."""

    def __init__(self, moved: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 7)
        self.o = nn.Linear(7, 3)
        self.moved = moved

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.moved(self.query(x)), self.moved(self.key(x))
        return self.o((q @ k.t()).softmax(-1) @ self.value(x))


BACK = torch.arange(ROWS).flip(0)
PAIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "indexed": lambda h: h[BACK],
    "gathered": lambda h: h.gather(0, BACK[:, None].expand_as(h)),
    "turned in place": lambda h: h.t_().t_(),
    "axes in place": lambda h: h.unsqueeze_(0).squeeze_(0),
}
UNPAIRED: dict[str, Callable[[Tensor], Tensor]] = {  # where a closed unit is not zero
    "set": lambda h: h.index_fill(0, BACK[:2], 1.0),
    "put": lambda h: h.index_put((BACK[:2],), torch.ones(()).to(h)),
    "added": lambda h: h.index_add(0, BACK[:2], torch.ones_like(h[:2])),
    "added to a slice": lambda h: (h[:2].add_(1), h)[1],
}


def check(model: nn.Module, sizes: list[int], residual: bool = False) -> None:
    """The sites have these sizes, and what is compacted does the same on other inputs."""
    net = pn.PlasticNet(precise(model), (torch.randn(ROWS, 6).double(),), residual=residual)
    assert [len(s) for s in net.sites.values()] == sizes, net.frozen
    for share in (0.2, 0.5, 0.9):
        close_units(net, share)
        small = net.eval().compact()
        for x in torch.randn(3, ROWS, 6).double():
            assert distance(net(x), small(x)) <= 1e-9


@pytest.mark.parametrize("way", [added, put, sorted_by_expert, indexed, selected, gathered, all_of_them])
def test_mixtures_with_stacked_weights(way: Callable[[Mixture, Tensor, Tensor, Tensor], Tensor]) -> None:
    check(Mixture(way), [16, 10] if way in (added, put, sorted_by_expert) else [10, 16])


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("made", LAYERS)
def test_graphs_with_computed_weights(made: str, sums: str) -> None:
    check(Graph(LAYERS[made], SUMS[sums]), [12, 14])


@pytest.mark.parametrize("residual", [False, True])
def test_rows_that_are_sorted_between_masked_weights(residual: bool) -> None:
    check(Masked(lambda h: h.topk(3, 0)[0]), [12, 14], residual)
    check(Masked(lambda h: F.normalize(h.sort(0)[0], dim=0)), [12, 14], residual)
    check(Masked(lambda h: F.normalize(h.topk(3, 0)[0], dim=1)), [12, 14] if residual else [14], residual)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_units_pass(name: str) -> None:
    check(Attention(PAIRS[name]), [12, 7])


@pytest.mark.parametrize("name", UNPAIRED)
def test_pairs_of_units_of_which_a_closed_one_is_not_zero_are_frozen(name: str) -> None:
    check(Attention(UNPAIRED[name]), [7])
