"""The expected cost against enumeration, counting, and gradcheck."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import ConvNet, images, randomise_gates
from torch import nn

from plasticnet import PlasticNet
from plasticnet.models import LeNet5


def tiny() -> nn.Module:
    class Residual(nn.Module):
        """A square layer whose input and output are one site: the variance matters."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).tanh()
            return self.c(h + self.b(h).tanh())

    return Residual()


@pytest.mark.parametrize("cost", ["units", "parameters", "macs"])
def test_expected_cost_equals_enumeration(cost: str) -> None:
    net = PlasticNet(tiny(), (torch.randn(2, 2),))
    net.k = 1.5
    randomise_gates(net)
    pi = net.sites["a"].probability(1.5).detach()
    expected = 0.0
    for pattern in itertools.product([0.0, 1.0], repeat=3):
        z = torch.tensor(pattern)
        n = float(z.sum())
        count = {"units": n, "parameters": 2 * n + n + n * n + n + n + 1, "macs": 2 * n + n * n + n}[cost]
        expected += float((pi * z + (1 - pi) * (1 - z)).prod()) * count
    assert net.penalty(1.0, cost).item() == pytest.approx(expected, rel=1e-5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("cost", ["units", "parameters", "macs"])
def test_penalty_passes_gradcheck(cost: str, scale: str) -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",)).double()
    net.k = 2.0
    randomise_gates(net)
    sites = list(net.sites.values())

    def penalty(*phis: torch.Tensor) -> torch.Tensor:
        value = net._cost.expected(torch.sigmoid(2.0 * torch.cat(phis)), cost)
        return 0.01 * (value if scale == "linear" else value.log())

    assert torch.autograd.gradcheck(penalty, tuple(s.phi.detach().clone().requires_grad_() for s in sites))
    net.zero_grad()
    net.penalty(0.01, cost, scale).backward()  # pyright: ignore[reportArgumentType]
    phis = [s.phi.detach().clone().requires_grad_() for s in sites]
    for s, g in zip(sites, torch.autograd.grad(penalty(*phis), phis), strict=True):
        torch.testing.assert_close(s.phi.grad, g)


def test_counts_of_lenet() -> None:
    summary = PlasticNet(LeNet5(), (torch.randn(1, 1, 28, 28),)).summary()
    assert summary.parameters == 431080
    assert summary.macs == 2293000
    costs = {s.name: (s.unit_parameters, s.unit_macs) for s in summary.sites}
    assert costs["conv1"] == (26 + 50 * 25, 576 * 25 + 64 * 50 * 25)
    assert costs["fc1"] == (801 + 10, 800 + 10)


def test_open_macs_equal_those_of_the_compact_network() -> None:
    net = PlasticNet(LeNet5(), (torch.randn(1, 1, 28, 28),))
    randomise_gates(net)
    again = PlasticNet(net.compact(), (torch.randn(1, 1, 28, 28),)).summary()
    assert (net.summary().open_macs, net.summary().open_parameters) == (again.macs, again.parameters)


def test_published_architecture_has_the_published_cost() -> None:
    net = PlasticNet(LeNet5(), (torch.randn(1, 1, 28, 28),), inputs=("fc1",))
    net.resize({"conv1": range(5), "conv2": range(10), "fc1": range(16)})
    net.resize({"fc1.input": range(76)})
    assert net.summary().macs == 5 * 576 * 25 + 64 * 10 * 125 + 76 * 16 + 160  # BC-GHS 5-10-76-16: published 158K


def test_penalty_at_infinite_k_is_a_constant() -> None:
    net = PlasticNet(ConvNet(), (images(),))
    assert not net.penalty(1.0).requires_grad or math.isinf(net.k)
    assert net.penalty(1.0).item() == sum(len(s) for s in net.sites.values())
