"""Input sites that are left out, or that fail the check, leave the sites that produce their features as they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from plasticnet import PlasticNet


class Chain(nn.Module):
    """Two convolutions, whose channels linear layers read through several features each."""

    def __init__(self, reads_width: bool = False, readers: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 4, 1)
        self.readers = nn.ModuleList(nn.Linear(12, 5) for _ in range(readers))
        self.head, self.reads_width = nn.Linear(5, 2), reads_width

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.reads_width:
            h = h * h.shape[1]
        h = self.b(h).tanh().flatten(1)
        return self.head(torch.stack([reader(h) for reader in self.readers]).sum(0).tanh())


X = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_exact(net: PlasticNet) -> None:
    net.eval()
    for k in (5.0, math.inf):
        net.k = k
        with torch.no_grad():
            for site in net.sites.values():
                site.phi.uniform_(-1, 1)
        small = net.compact()
        assert (net(X) - small(X)).abs().max() <= 1e-12
    net.prune()
    assert (net(X) - small(X)).abs().max() <= 1e-12
    net.grow({n: 1 for n, s in net.sites.items() if s.room and not n.endswith(".input")})
    assert (net(X) - small(X)).abs().max() <= 1e-12


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("exclude", ["readers.0.input", "readers.*.input", "*.input", "b", "a"])
def test_sites_beside_an_excluded_one(readers: int, exclude: str) -> None:
    without = PlasticNet(Chain(readers=readers).double(), (X,), inputs=["*"])
    net = PlasticNet(Chain(readers=readers).double(), (X,), inputs=["*"], exclude=exclude)
    assert set(net.sites) == set(without.sites) - set(net.excluded)
    assert net.excluded
    assert net.frozen == without.frozen
    assert_exact(net)


@pytest.mark.parametrize("readers", [1, 2])
def test_sites_beside_one_that_fails(readers: int) -> None:
    """The culprit is found by leaving out sites, also those between producers and consumers."""
    net = PlasticNet(Chain(reads_width=True, readers=readers).double(), (X,), inputs=["*"])
    assert set(net.frozen) == {"a", "head"}
    assert "b" in net.sites
    assert "readers.0.input" in net.sites
    assert_exact(net)


def test_an_input_site_that_fails() -> None:
    class Position(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * x.shape[1])  # the width after features were taken

    model = Chain().double()
    model.readers[0] = Position(12, 5).double()
    net = PlasticNet(model, (X,), inputs=["*"])
    assert not any("('" in reason for reason in net.frozen.values()), net.frozen
    assert_exact(net)


class Stubborn(nn.Linear):
    """Its width cannot be changed once it is built."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "out_features" and "_parameters" in vars(self) and self._parameters:
            raise KeyError(name)
        super().__setattr__(name, value)


def test_what_cannot_be_changed_is_frozen_with_a_reason_of_its_own() -> None:
    layers = nn.Linear(4, 6), nn.Tanh(), Stubborn(6, 5), nn.Tanh(), nn.Linear(5, 3)
    net = PlasticNet(nn.Sequential(*layers).double(), (torch.randn(3, 4).double(),))
    assert list(net.sites) == ["0"]
    assert "cannot be changed: KeyError('out_features')" in net.frozen["2"]


class Sequence(nn.Module):
    """A recurrent layer, all of whose weights lie in one module, behind features that a norm-free chain makes."""

    def __init__(self, kind: type[nn.RNNBase], layers: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 6, 1), nn.Conv1d(2, 5, 1)
        self.rnn, self.head = kind(22, 4, num_layers=layers, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.view(len(x) * 3, 2, 2)
        h = torch.cat([self.a(pairs).flatten(1), self.b(pairs).flatten(1)], 1)
        return self.head(self.rnn(h.view(len(x), 3, -1).tanh())[0][:, -1])


@pytest.mark.parametrize("exclude", [(), "rnn.input", "a", "b"])
@pytest.mark.parametrize(("kind", "layers"), [(nn.LSTM, 2), (nn.GRU, 1), (nn.RNN, 3)])
def test_a_consumer_with_other_weights(kind: type[nn.RNNBase], layers: int, exclude: str | tuple[()]) -> None:
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    net = PlasticNet(Sequence(kind, layers).double(), (x,), inputs=["*"], exclude=exclude).eval()
    assert "rnn" in net.sites
    assert ("rnn.input" in net.sites) == (exclude != "rnn.input")
    read = {c.tensor for n in ("a", "b") if n in net.sites for c in net.sites[n].units.consumers}
    assert read == {"rnn.weight_ih_l0"}
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.uniform_(-1, 1)
    assert (net(x) - net.compact()(x)).abs().max() <= 1e-12


class Twice(nn.Module):
    """A weight that is read through its module, and once more by another one or by a function."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 1), nn.Conv1d(2, 4, 1)
        self.first, self.second, self.head, self.way = nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(5, 2), way
        if way != "function":
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        a, b = (layer(x).tanh().flatten(1) for layer in (self.a, self.b))
        if self.way == "function":
            h = self.first(a) + nn.functional.linear(b, self.first.weight)
        else:
            h = self.first(a) + self.second(b) if self.way == "module" else self.second(b) + self.first(a)
        return self.head(h.tanh())


@pytest.mark.parametrize("way", ["function", "module", "module, in the other order"])
def test_a_weight_that_is_read_in_two_ways(way: str) -> None:
    net = PlasticNet(Twice(way).double(), (X,), inputs=["*"])
    assert not any("('" in reason or "out of bounds" in reason for reason in net.frozen.values()), net.frozen
    assert "first" in net.sites
    assert_exact(net)
