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


def test_an_error_of_cutting_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in the library itself must not be taken for a fault of the model."""

    def broken(*_: object) -> None:
        raise KeyError("broken")

    model = Chain().double()
    monkeypatch.setattr("plasticnet.checking.compare.cut", broken)
    with pytest.raises(KeyError, match="broken"):
        PlasticNet(model, (X,))
