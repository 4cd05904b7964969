"""Random numbers in the evaluation forward are compared with equal numbers for a sample, or there is a reason."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet

X = torch.randn(5, 6, dtype=torch.float64)


class Drawing(nn.Module):
    """Two layers, after each of which something random may happen."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.a(x).relu())
        return self.c(self.second(self.b(h).relu()))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda h: h + 0.1 * torch.randn_like(h),
    "noise of a shape": lambda h: h + torch.rand(h.shape, dtype=h.dtype) - 0.5,
    "in place": lambda h: h + torch.empty_like(h).normal_(0, 0.1),
    "uniform in place": lambda h: h * torch.empty_like(h).uniform_(0.5, 1.5),
    "exponential": lambda h: h + torch.empty_like(h).exponential_(2.0),
    "dropout": lambda h: F.dropout(h, 0.5),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.5, True),
    "dropout of features": lambda h: F.dropout1d(h[:, :, None], 0.3)[:, :, 0],
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.7)),
    "bernoulli in place": lambda h: h * torch.empty_like(h).bernoulli_(0.7),
    "rsample": lambda h: torch.distributions.Normal(h, 0.3, validate_args=False).rsample(),
    "rows": lambda h: h[torch.randperm(len(h))] * (torch.rand(len(h), 1) < 0.7),
    "integers": lambda h: h * torch.randint_like(h, 1, 4),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_freeze_nothing(kind: str) -> None:
    torch.manual_seed(0)
    model = Drawing(DRAWS[kind], DRAWS["noise"]).double()
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    net = PlasticNet(model, (X,))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in net.model.named_parameters())
    assert list(net.sites) == ["a", "b"]
    net.grow({"a": 2, "b": 1})
    net.resize({"a": [0, 2, 5, 12], "b": [1, 3]})
    assert net.compact()(X).shape == (5, 3)


@pytest.mark.parametrize("kind", ["rows", "none"])
def test_exact_under_one_seed_where_no_draw_has_a_width(kind: str) -> None:
    model = Drawing(DRAWS.get(kind, lambda h: h), lambda h: h * torch.rand(len(h), 1).round())
    net = PlasticNet(model.double(), (X,))
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[::2] = -1.0
    outs = []
    for network in (net.eval(), net.compact()):
        torch.manual_seed(3)
        outs.append(network(X))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)


def test_narrow_and_grow_a_vae() -> None:
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.mu, self.lv = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 4)
            self.d, self.o = nn.Linear(4, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.e(x).relu()
            mu, lv = self.mu(h), self.lv(h)
            return self.o(self.d(mu + torch.randn_like(mu) * (lv / 2).exp()).relu()), mu, lv

    net = PlasticNet(Vae(), (X.float(),))
    pn.narrow(net, 3)
    assert {n: len(s) for n, s in net.sites.items()} == {"e": 3, "d": 3}
    net.grow({"e": 2, "d": 1})
    assert {n: len(s) for n, s in net.sites.items()} == {"e": 5, "d": 4}


def test_what_a_draw_mixes_stays_frozen() -> None:
    shuffled = Drawing(lambda h: h[:, torch.randperm(h.shape[1])]).double()
    net = PlasticNet(shuffled, (X,))
    assert "a" in net.frozen
    assert list(net.sites) == ["b"]


def test_a_generator_of_the_models_own() -> None:
    own = torch.Generator().manual_seed(3)
    net = PlasticNet(Drawing(lambda h: h * torch.rand(len(h), 1, generator=own)).double(), (X,))
    assert list(net.sites) == ["a", "b"]


CLOCK = iter(range(10**6))


@pytest.mark.parametrize(
    "other", [lambda: random.random(), lambda: np.random.default_rng().random(), lambda: float(next(CLOCK))]
)
def test_numbers_that_are_not_torchs_are_named(other: Callable[[], float]) -> None:
    with pytest.raises(PlasticError, match=r"other outputs whenever it is called.*not torch's"):
        PlasticNet(Drawing(lambda h: h * (1 + other())).double(), (X,))


# -- what the caller reads beside the output --------------------------------------------------


class Filling(nn.Module):
    """Puts what it has found where the caller finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, into: list[Tensor] | dict[str, Tensor] | object) -> Tensor:
        h = self.a(x).relu()
        if isinstance(into, list):
            into.append(h)
        elif isinstance(into, dict):
            into["h"] = h
        else:
            into.h = h  # pyright: ignore[reportAttributeAccessIssue]
        return self.c(self.b(h).relu())


class Place:
    pass


@pytest.mark.parametrize("into", [[], {}, Place()])
def test_arguments_that_the_model_fills(into: object) -> None:
    net = PlasticNet(Filling().double(), {"x": X, "into": into})
    assert list(net.sites) == ["b"]
    assert net.frozen["a"] == "the model puts it into one of its arguments, which the caller reads"


def test_arrays_of_numpy_among_the_outputs() -> None:
    class Array(Filling):
        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, np.ndarray]]:
            h = self.a(x).relu()
            return self.c(self.b(h).relu()), {"h": h.detach().numpy()}

    net = PlasticNet(Array().double(), (X,))
    assert list(net.sites) == ["b"]
    assert "a" in net.frozen
