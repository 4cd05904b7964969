"""Unbiasedness by full enumeration of all gate patterns, and the surrogate's gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import ESTIMATORS, PlasticNet
from plasticnet.estimators import partner_gates
from plasticnet.objective import estimate
from plasticnet.passes import Draw

DRAWS = 4000


def problem(norm: bool) -> tuple[PlasticNet, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    net = PlasticNet(model, (x,))
    net.k = 2.0
    with torch.no_grad():
        net.sites["0"].phi.copy_(torch.tensor([-0.5, -0.2, 0.0, 0.3, 0.5, 0.9]))
    return net, x, y


def exact_gradient(net: PlasticNet, x: Tensor, y: Tensor) -> Tensor:
    """d/dphi of sum over all 2^n patterns of p(z) f(z), with f through the weights by hand."""
    phi = net.sites["0"].phi.detach().clone().requires_grad_()
    pi = torch.sigmoid(net.k * phi)
    last = net.model[-1]
    total = torch.zeros(())
    with torch.no_grad():
        net.model.train()
        hidden = x
        for layer in list(net.model)[:-1]:
            hidden = layer(hidden)
    for pattern in itertools.product([0.0, 1.0], repeat=6):
        z = torch.tensor(pattern)
        f = F.cross_entropy(last(hidden * z).detach(), y)
        total = total + (pi * z + (1 - pi) * (1 - z)).prod() * f
    (gradient,) = torch.autograd.grad(total, phi)
    return gradient


@pytest.mark.slow
@pytest.mark.parametrize(("gates", "norm"), [("sample", False), ("batch", False), ("auto", True)])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_unbiased(estimator: str, gates: str, norm: bool) -> None:
    net, x, y = problem(norm)
    net.estimator, net.gates_mode = estimator, gates
    exact = exact_gradient(net, x, y)
    net.train()
    estimates = []
    for _ in range(DRAWS):
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        (gradient,) = torch.autograd.grad(loss, net.sites["0"].phi)
        estimates.append(gradient)
    stacked = torch.stack(estimates)
    error = stacked.std(0) / DRAWS**0.5
    assert ((stacked.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all()
    assert (error < exact.abs().max()).all()  # the test could fail: the noise does not hide the gradient


@pytest.mark.parametrize("gates", ["sample", "batch"])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_surrogate_equals_pure_function(estimator: str, gates: str) -> None:
    net, x, y = problem(norm=False)
    net.estimator, net.gates_mode = estimator, gates
    net.train()
    seen: list[Tensor] = []

    def closure() -> Tensor:
        f = F.cross_entropy(net(x), y, reduction="none")
        seen.append(f.detach())
        return f

    loss = net.expected_loss(closure)
    loss.backward()
    assert net._draw is not None
    site, u, v = net.sites["0"], net._draw.u, net._draw.v
    pi = torch.sigmoid(2.0 * site.phi.detach())
    z1 = (u < pi).float()
    partner = ESTIMATORS[estimator].partner
    z2 = z1 if partner == "none" else partner_gates(partner, u, v, pi)
    f1, f2 = (seen[-1], seen[-1]) if partner == "none" else (seen[-1], seen[-2])
    if gates == "batch":
        f1, f2 = f1.mean()[None], f2.mean()[None]
    expected = ESTIMATORS[estimator].gradient(u, z1, z2, pi, 2.0, f1, f2)
    assert torch.equal(loss.detach(), seen[-1].mean())
    torch.testing.assert_close(site.phi.grad, expected)


def test_disarm_never_more_variance_than_arm() -> None:
    pi, k = torch.sigmoid(torch.linspace(-2, 2, 6)), 1.0
    u = torch.rand(20000, 6)
    z1, z2 = (u < pi).float(), partner_gates("antithetic", u, None, pi)
    weights = torch.randn(6)
    f1, f2 = (z1 @ weights) ** 2, (z2 @ weights) ** 2
    variances = {}
    for name in ("arm", "disarm"):
        g = ESTIMATORS[name].gradient
        draws = [
            g(u[i : i + 1], z1[i : i + 1], z2[i : i + 1], pi, k, f1[i : i + 1], f2[i : i + 1]) for i in range(2000)
        ]
        variances[name] = torch.stack(draws).var(0)
    assert (variances["disarm"] <= 1.05 * variances["arm"]).all()


def test_held_gates_get_no_gradient() -> None:
    net, x, y = problem(norm=False)
    net.estimator = "arm"
    net.sites["0"].grace[2] = 1
    net.train()
    (net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + net.penalty(1.0)).backward()
    gradient = net.sites["0"].phi.grad
    assert gradient is not None
    assert gradient[2] == 0
    assert (gradient[[0, 1, 3, 4, 5]] != 0).all()


def test_estimate_of_shared_site_uses_batch_mean() -> None:
    net, x, y = problem(norm=False)
    net.train()
    net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    draw = net._draw
    assert draw is not None
    draw.u = draw.u[:1].expand_as(draw.u)
    f1, f2 = torch.randn(5), torch.randn(5)
    net._gating.per_sample["0"] = False
    shared = estimate(net, draw, f1, f2)
    alone = estimate(net, Draw(draw.pi, draw.u[:1], None, draw.after), f1.mean()[None], f2.mean()[None])
    torch.testing.assert_close(shared, alone)
