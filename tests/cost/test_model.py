"""The expected cost against enumeration, counting, and gradcheck; mixtures of costs, and limits of sites."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.optim import SGD

from plasticnet import PlasticError, PlasticNet, Schedule, Stage
from plasticnet.apps.models import LeNet5
from tests.kit.networks import ConvNet, images, mlp, randomise_gates, set_probabilities, small, tiny


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
        value = net.cost.expected(torch.sigmoid(2.0 * torch.cat(phis)), cost)
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


# -- mixtures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2.0, math.inf])
def test_a_mixture_is_the_weighted_sum(k: float) -> None:
    net = PlasticNet(ConvNet(), (images(),)).double()
    net.k = k
    if k == 2.0:
        randomise_gates(net)
    weights = {"units": 2.0, "parameters": 0.25, "macs": 3.0}
    for scale, apart in (("linear", lambda c: net.penalty(1.0, c)), ("log", lambda c: net.penalty(1.0, c, "log"))):
        expected = 0.1 * sum(w * apart(c).item() for c, w in weights.items())
        assert net.penalty(0.1, weights, scale).item() == pytest.approx(expected, rel=1e-6)  # pyright: ignore
    assert net.penalty(1.0, {"macs": 1.0, "units": 0.0}).item() == net.penalty(1.0, "macs").item()


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({}, "above 0"),
        ({"macs": 0.0}, "above 0"),
        ({"flops": 1.0}, "flops"),
        ({"macs": -1.0}, "weight of 'macs'"),
        ({"macs": math.nan}, "weight of 'macs'"),
        ({"macs": "1"}, "weight of 'macs'"),
        (["macs"], "choose from"),
    ],
)
def test_bad_mixtures(cost: Any, message: str) -> None:
    with pytest.raises(PlasticError, match=message):
        small()[0].penalty(1.0, cost)


# -- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("cost", ["units", "macs", {"macs": 1.0, "parameters": 2.0}])
def test_strengths_scale_the_gradient_and_leave_the_value(cost: Any, scale: Any) -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",)).double()
    net.k = 2.0
    randomise_gates(net)
    plain = net.penalty(1.0, cost, scale)
    strengths = dict(zip(net.sites, itertools.cycle([0.0, 0.5, 3.0]), strict=False))
    for name, strength in strengths.items():
        net.limit(name, strength=strength)
    found = net.penalty(1.0, cost, scale)
    assert found.item() == plain.item()
    found.backward()
    for name, site in net.sites.items():  # finite differences of the value
        slope, step = torch.zeros_like(site.phi), 1e-5
        for i in range(len(site)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    site.phi[i] += sign * step
                    values.append(net.penalty(1.0, cost, scale))
                    site.phi[i] -= sign * step
            slope[i] = (values[0] - values[1]).item() / (2 * step)
        torch.testing.assert_close(site.phi.grad, strengths[name] * slope, rtol=1e-5, atol=1e-8)
    assert any(s.phi.grad is not None and bool(s.phi.grad.any()) for s in net.sites.values())


def test_strengths_follow_limits_and_sizes() -> None:
    net, _ = small()
    net.k = 1.0

    def gradient(name: str) -> float:
        net.zero_grad()
        net.penalty(1.0).backward()
        grad = net.sites[name].phi.grad
        assert grad is not None
        return float(grad.sum())

    first, second = gradient("0"), gradient("2")
    net.limit("0", strength=0.5)
    assert gradient("0") == pytest.approx(0.5 * first)
    net.sites["0"].strength = 0.25
    assert gradient("0") == pytest.approx(0.25 * first)
    net.resize({"0": range(3)})
    assert gradient("0") == pytest.approx(0.25 * first / 2)
    assert gradient("2") == pytest.approx(second)
    net.limit("0")  # anew
    assert gradient("0") == pytest.approx(first / 2)
    for strength in (-1.0, math.nan, math.inf, "1", True):
        with pytest.raises(PlasticError, match="strength"):
            net.limit("0", strength=strength)  # pyright: ignore[reportArgumentType]
    assert [s.strength for s in net.sites.values()] == [1.0, 1.0]


@pytest.mark.parametrize(("minimum", "left"), [(0, 0), (1, 1), (2, 2)])
def test_a_site_dies_only_where_it_may(minimum: int, left: int) -> None:
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),))
    optimizer = SGD(net.parameters(), 0.1)
    schedule = Schedule(net, optimizer, [Stage(1, 7.0), Stage(1, math.inf)])
    net.limit("0", minimum=minimum)
    set_probabilities(net, "0", 0.3, 0.2, 0.4, 0.1, 0.1, 0.1)
    schedule.step()  # hardens
    assert int(net.sites["0"].open.sum()) == left
    assert len(net.sites["0"]) == max(left, 1)
    x = torch.randn(5, 4)
    torch.testing.assert_close(net.compact()(x), net.eval()(x))
    if not left:  # nothing of the input is left
        assert torch.equal(net(x), net(torch.zeros(5, 4)))
