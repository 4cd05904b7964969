"""Models whose forward takes a gradient, such as forces: the derivative of an energy with respect to positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

import plasticnet as pn
from plasticnet import Budget, PlasticNet, Schedule, Stage
from plasticnet.learning.estimators import ESTIMATORS


class Potential(nn.Module):
    """An energy, and the forces."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 12), nn.SiLU())
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor, forces: bool = True) -> Any:
        if not forces:
            return self.head(self.body(x))
        x = x.detach().requires_grad_()
        energy = self.head(self.body(x))
        return energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Prefixed(Potential):
    """What comes before the first gate is more than one layer, and is differentiated through."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3)

    def forward(self, x: Tensor, forces: bool = True) -> Any:
        x = x.detach().requires_grad_()
        energy = self.head(self.body(self.before(x).tanh()))
        return energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def positions(n: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, dtype=dtype)


def losses(net: Any, x: Tensor) -> Tensor:
    energy, forces = net(x)
    return (energy[:, 0] - x.square().sum(1)).square() + (forces + 2 * x).square().mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [Potential, Prefixed])
def test_forces_are_traced(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    x = positions(4, dtype)
    with_forces = PlasticNet(make().to(dtype), {"x": x, "forces": True}, weights=("head",))
    first = {"before": 3} if make is Prefixed else {}
    assert {n: len(s) for n, s in with_forces.sites.items()} == {**first, "body.0": 16, "body.3": 12}
    assert list(with_forces.weights) == ["head.weight"]
    if make is Potential:
        without = PlasticNet(make().to(dtype), {"x": x, "forces": False}, weights=("head",))
        assert with_forces.frozen.keys() == without.frozen.keys()
        # The multiply-adds are those of the energy.
        assert with_forces.summary().macs == without.summary().macs
    with_forces.resize({"body.0": [0, 1, 5, -1], "body.3": [2, 3]})
    with_forces.eval()
    for one, other in zip(with_forces(x), with_forces.compact()(x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [Potential, Prefixed, lambda: Potential(dropout=0.2)])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_every_estimator_trains(estimator: str, make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    x = positions(dtype=dtype)
    for gates in ("auto", "batch"):
        net = PlasticNet(make().to(dtype), {"x": x[:2], "forces": True}, estimator=estimator, gates=gates)  # pyright: ignore[reportArgumentType]
        net.k = 3.0
        net.train()
        for _ in range(2):
            net.zero_grad()
            net.expected_loss(lambda net=net: losses(net, x)).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert gates == "batch" or net.sampler.samples_apart is True
        del net


def test_a_step_is_the_same_whichever_way_the_need_was_noticed() -> None:
    """The first step finds out that no pass runs without gradients; the others know it. The draws are the same."""
    x = positions()
    for gates in ("sample", "batch"):
        net = PlasticNet(Potential(dropout=0.3), {"x": x[:2], "forces": True}, gates=gates)  # pyright: ignore[reportArgumentType]
        net.k = 3.0
        net.train()
        found = []
        for _ in range(2):
            torch.manual_seed(1)
            net.zero_grad()
            net.expected_loss(lambda net=net: losses(net, x)).backward()
            found.append([*(p.grad for p in net.parameters()), torch.get_rng_state()])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        del net


def test_gates_per_sample_have_the_slopes_of_forces() -> None:
    """The gradient goes through a derivative, so that the gate's own backward pass is differentiated."""
    x = positions(dtype=torch.float64)
    model = Potential().double()
    found = []
    for gates in ("sample", "batch"):
        net = PlasticNet(model, {"x": x[:2], "forces": True}, gates=gates, estimator="straight-through")  # pyright: ignore[reportArgumentType]
        net.k = 1.0
        with torch.no_grad():
            for site in net.sites.values():  # all draws are alike: every other gate is closed
                site.phi.copy_(torch.tensor([40.0, -40.0]).double().repeat(len(site) // 2))
                site.phi[0] = 8.0
        net.train()
        torch.manual_seed(0)
        net.expected_loss(lambda net=net: losses(net, x)).backward()
        found.append([p.grad for p in model.parameters()] + [s.phi.grad[:1] for s in net.sites.values()])  # pyright: ignore[reportOptionalSubscript]
        model.zero_grad()
        del net
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert one.any()


def test_a_closure_that_takes_the_gradient_itself() -> None:
    """A penalty on the gradient with respect to the inputs."""
    net = PlasticNet(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), (positions(2),))
    net.k = 3.0
    net.train()

    def closure() -> Tensor:
        x = positions().requires_grad_()
        out = net(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.square()[:, 0] + (slope.norm(dim=1) - 1).square()

    for _ in range(3):
        net.expected_loss(closure).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_hooks_on_gradients() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            h.register_hook(lambda grad: grad.clamp(-1, 1))
            return self.b(h)

    net = PlasticNet(Hooked(), (positions(2),))
    net.k = 3.0
    net.train().expected_loss(lambda: net(positions()).square().sum(1)).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_other_errors_stay_what_they_are() -> None:
    net = PlasticNet(Potential(), {"x": positions(2), "forces": False})
    net.k = 3.0
    with pytest.raises(RuntimeError, match="on purpose"):
        net.train().expected_loss(lambda: (_ for _ in ()).throw(RuntimeError("on purpose")))
    assert net.sampler.differentiates is False


def test_scores_budgets_and_what_is_measured() -> None:
    torch.manual_seed(0)
    x = positions(64)
    net = PlasticNet(Potential(), {"x": x[:2], "forces": True})
    for kind in ("gate", "taylor"):
        assert all(s.isfinite().all() for s in pn.scores(net, kind, lambda: losses(net, x)).values())
    assert net.measure_latency({"x": x, "forces": True}, networks=8, repeats=1).milliseconds > 0
    assert pn.profile(net, {"x": x, "forces": True}).macs > 0
    whole = net.summary().macs
    optimizer = Adam(net.param_groups(1e-2, 0.1))
    schedule = Schedule(net, optimizer, [Stage(1), Stage(4, k=7.0), Stage(1)], budget=Budget(macs=0.4))
    for _ in range(schedule.epochs):
        net.train()
        for _ in range(10):
            optimizer.zero_grad()
            (net.expected_loss(lambda: losses(net, x)) + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()
    assert 0.2 * whole < net.summary().macs <= 0.4 * whole
    net.eval()
    for one, other in zip(net(x), net.compact()(x), strict=True):
        torch.testing.assert_close(one, other)
