"""Unbiasedness by full enumeration of all gate patterns, and the surrogate's gradient."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import ESTIMATORS, Budget, PlasticNet, Schedule, Stage
from plasticnet.learning.coupling import copula, correlation
from plasticnet.tools.statistics import running_statistics
from tests.kit.draws import last_draw

DRAWS = 600


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
        hidden = x
        for layer in list(net.model)[:-1]:
            hidden = layer(hidden)
    for pattern in itertools.product([0.0, 1.0], repeat=6):
        z = torch.tensor(pattern)
        f = F.cross_entropy(last(hidden * z).detach(), y)
        total = total + (pi * z + (1 - pi) * (1 - z)).prod() * f
    (gradient,) = torch.autograd.grad(total, phi)
    return gradient


def curved(z: Tensor) -> Tensor:
    """A loss of gates (rows, 6) with curvature and interactions: (rows,)."""
    mix = torch.linspace(-1.3, 1.7, 36, dtype=z.dtype).sin().reshape(6, 6)
    return (z @ mix).tanh().sum(1) ** 2 + (z[:, 0] - 0.3 * z[:, 1]) ** 3 - 1.5 * z[:, 2] * z[:, 3] + z[:, 5] ** 4


def certainties(name: str) -> Tensor:
    pi = torch.tensor([0.02, 0.3, 0.5, 0.7, 0.95, 0.999], dtype=torch.float64)
    return torch.tensor([0.02, 0.3, 0.5, 0.97, 0.05, 0.9], dtype=torch.float64) if name == "ugc" else pi


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_pure_functions_are_unbiased(name: str, shared: bool) -> None:
    """Over all 2^6 patterns: each row is a batch of its own here, with the loss of its gates."""
    estimator, pi, k = ESTIMATORS[name], certainties(name), 2.0
    patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    phi = (pi.logit() / k).requires_grad_()
    p = torch.sigmoid(k * phi)
    weights = torch.where(patterns > 0, p, 1 - p).prod(1)
    (exact,) = torch.autograd.grad(weights @ curved(patterns), phi)
    sizes = torch.tensor([2.0, 2.0, 1.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    mask = torch.tensor([True, False, False, False, True, False]) if shared else None
    estimates = []
    for _ in range(1000 if shared else 40):
        draw = estimator.draw(pi, sizes, 100 if shared else 20_000, mask)
        f = torch.stack([curved(estimator.gates(draw, i)) for i in range(estimator.partners + 1)])
        z = pi.expand(draw.rows, 6) if estimator.at == "mean" else estimator.gates(draw, 0)
        z = z.clone().requires_grad_()
        (b,) = torch.autograd.grad(curved(z).mean(), z)
        b = b if mask is None else torch.where(mask, b.mean(0), b)
        estimates.append(estimator.gradient(draw, k, f, b))
    stacked = torch.stack(estimates)
    error = stacked.std(0) / len(stacked) ** 0.5
    wrong = (stacked.mean(0) - exact).abs()
    if estimator.biased:
        assert (wrong > 10 * error).any()
    else:
        assert (wrong <= 4.5 * error + 1e-9).all()
        assert error.median() < exact.abs().max() / 4  # the test could fail: noise does not hide the gradient


CASES = [("sample", False), ("batch", False), ("auto", True), ("sample", True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gates", "norm"),
    [(n, *c) for n in ("disarm", "arms", "disarm-cv", "disarm-mean", "ugc") for c in (CASES[0], CASES[2])]
    + [("bitflip-cv", *c) for c in CASES],
)
def test_unbiased(name: str, gates: Literal["auto", "sample", "batch"], norm: bool) -> None:
    net, x, y = problem(norm)
    net.sampler.estimator, net.sampler.mode = name, gates
    with running_statistics(net.model) if gates == "sample" else nullcontext():  # those that are compared
        exact = exact_gradient(net, x, y)
    net.train()
    estimates = []
    for _ in range(DRAWS):
        if norm:
            net.model[1].momentum = 0.0  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        (gradient,) = torch.autograd.grad(loss, net.sites["0"].phi)
        estimates.append(gradient)
    stacked = torch.stack(estimates)
    error = stacked.std(0) / DRAWS**0.5
    assert ((stacked.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all()
    assert (error < exact.abs().max()).all()  # the test could fail: the noise does not hide the gradient


@pytest.mark.parametrize(("gates", "norm"), CASES)
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_surrogate_equals_pure_function(name: str, gates: Literal["auto", "sample", "batch"], norm: bool) -> None:
    """With gradients scaled, as a loss scaler or accumulation does."""
    net, x, y = problem(norm)
    net.sampler.estimator, net.sampler.mode = name, gates
    estimator = ESTIMATORS[name]
    net.train()
    loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    (3 * loss).backward()
    draw, site, last = last_draw(net), net.sites["0"], net.model[-1]  # pyright: ignore[reportIndexIssue]
    assert draw is not None
    rows, running = draw.rows, norm and gates == "sample"

    def losses(z: Tensor, running: bool = running) -> Tensor:
        with running_statistics(net.model) if running else nullcontext(), torch.no_grad():
            hidden = net.model[:-1](x)  # pyright: ignore[reportIndexIssue]
        f = F.cross_entropy(last(hidden * z), y, reduction="none")  # pyright: ignore[reportCallIssue]
        return f if rows > 1 else f.mean()[None]

    with torch.no_grad():
        state = {n: b.clone() for n, b in net.model.named_buffers()}
        if running:  # they were compared before the training pass moved the statistics
            for n, b in net.model.named_buffers():
                b.copy_(torch.ones_like(b) if n.endswith("var") else torch.zeros_like(b))
        f = torch.stack([losses(estimator.gates(draw, i)) for i in range(estimator.partners + 1)])
        for n, b in net.model.named_buffers():
            b.copy_(state[n])
    z = draw.pi.expand(rows, -1) if estimator.at == "mean" else estimator.gates(draw, 0)
    z = z.clone().requires_grad_()
    (b,) = torch.autograd.grad(losses(z, running=False).mean(), z)
    torch.testing.assert_close(site.phi.grad, 3 * estimator.gradient(draw, 2.0, f, b))


def test_disarm_never_more_variance_than_arm() -> None:
    pi, k = torch.sigmoid(torch.linspace(-2, 2, 6)), 1.0
    variances = {}
    for name in ("arm", "disarm"):
        estimates = []
        for _ in range(2000):
            draw = ESTIMATORS[name].draw(pi, torch.ones(6), 1)
            f = torch.stack([curved(ESTIMATORS[name].gates(draw, i)) for i in (0, 1)])
            estimates.append(ESTIMATORS[name].gradient(draw, k, f))
        variances[name] = torch.stack(estimates).var(0)
    assert (variances["disarm"] <= 1.05 * variances["arm"]).all()


@pytest.mark.slow
def test_slopes_lower_the_variance() -> None:
    """Of a loss that is nearly linear."""
    pi, k, rows = torch.full((6,), 0.6), 2.0, 64
    variances = {}

    def slight(z: Tensor) -> Tensor:
        return z @ torch.arange(1.0, 7.0) + 0.1 * curved(z)

    for name in ("disarm", "disarm-cv", "disarm-mean", "bitflip", "bitflip-cv"):
        estimator, estimates = ESTIMATORS[name], []
        for _ in range(500):
            draw = estimator.draw(pi, torch.full((6,), 6.0), rows)
            f = torch.stack([slight(estimator.gates(draw, i)) for i in range(estimator.partners + 1)])
            z = draw.pi.expand(rows, -1) if estimator.at == "mean" else estimator.gates(draw, 0)
            z = z.clone().requires_grad_()
            (b,) = torch.autograd.grad(slight(z).mean(), z)
            estimates.append(estimator.gradient(draw, k, f, b))
        variances[name] = float(torch.stack(estimates).var(0).sum())
    assert variances["disarm-cv"] < variances["disarm"] / 3
    assert variances["disarm-mean"] < variances["disarm"] / 3
    assert variances["bitflip-cv"] < variances["bitflip"] / 3
    assert variances["bitflip-cv"] < variances["disarm-cv"]


def test_copula_has_the_right_marginals_and_correlation() -> None:
    pi = torch.tensor([0.03, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    draw = ESTIMATORS["arms"].draw(pi, torch.ones(5), 200_000)
    z = torch.stack([copula(draw, i) for i in range(4)])
    torch.testing.assert_close(z.mean((0, 1)), pi, atol=4e-3, rtol=0)
    deviation = (pi * (1 - pi)).sqrt()
    both = ((z[0] - pi) * (z[1] - pi)).mean(0) / deviation**2
    torch.testing.assert_close(both, correlation(pi, 4), atol=1.5e-2, rtol=0)
    assert (both < 0).all()


def test_held_gates_get_no_gradient() -> None:
    net, x, y = problem(norm=False)
    net.sampler.estimator = "arm"
    net.sites["0"].grace[2] = 1
    net.train()
    (net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + net.penalty(1.0)).backward()
    gradient = net.sites["0"].phi.grad
    assert gradient is not None
    assert gradient[2] == 0
    assert (gradient[[0, 1, 3, 4, 5]] != 0).all()


def test_the_size_of_the_gradient_is_known_without_its_scale() -> None:
    """A budget weighs its pressure by it."""
    net, x, y = problem(norm=False)
    net.train()
    (1000 * net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))).backward()
    assert net.sampler.gradient is not None
    assert net.sites["0"].phi.grad is not None
    torch.testing.assert_close(1000 * net.sampler.gradient, net.sites["0"].phi.grad)


def test_a_scale_that_overflows_leaves_the_budget_working() -> None:
    net, x, y = problem(norm=False)
    optimizer = torch.optim.Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, [Stage(3, 2.0), Stage(1)], budget=Budget(units=0.5))
    net.train()
    for scale in (1.0, math.inf, 0.0, 1.0, 1.0):
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + schedule.penalty()
        net.zero_grad()
        (scale * loss).backward()
    assert torch.isfinite(schedule.force.sizes).all()
    assert net.sites["0"].phi.grad is not None
    assert torch.isfinite(net.sites["0"].phi.grad).all()


def test_slopes_come_through_a_later_call_of_the_network() -> None:
    """The first one may be a target without gradients."""
    net, x, y = problem(norm=False)
    net.sampler.estimator = "straight-through"
    net.train()

    def closure() -> Tensor:
        with torch.no_grad():
            target = net(x).softmax(1)
        return F.cross_entropy(net(x), y, reduction="none") + (net(x).softmax(1) - target).square().sum(1)

    net.expected_loss(closure).backward()
    assert net.sites["0"].phi.grad is not None
    assert net.sites["0"].phi.grad.all()


def test_the_slopes_are_those_of_the_step() -> None:
    """Whatever is set before the backward pass, and however often that runs."""
    net, x, y = problem(norm=False)
    net.train()
    torch.manual_seed(5)
    net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")).backward()
    expected = net.sites["0"].phi.grad
    net.zero_grad()
    torch.manual_seed(5)
    loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    net.sampler.estimator = "arm"
    net.k = 5.0
    for _ in range(2):
        net.zero_grad()
        loss.backward(retain_graph=True)
        torch.testing.assert_close(net.sites["0"].phi.grad, expected)
        torch.testing.assert_close(net.sampler.gradient, expected)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("backward", [False, True])
def test_a_step_leaves_no_graph_behind(name: str, backward: bool) -> None:
    """Without the garbage collector: a graph in a cycle would hold the activations until it comes."""
    net, x, y = problem(norm=False)
    net.sampler.estimator = name
    net.train()
    outputs: list[weakref.ref[Tensor]] = []

    def closure() -> Tensor:
        output = net(x)
        outputs.append(weakref.ref(output))
        return F.cross_entropy(output, y, reduction="none")

    gc.disable()
    try:
        loss = net.expected_loss(closure)
        if backward:
            loss.backward()
        del loss
        assert outputs
        assert all(ref() is None for ref in outputs)
    finally:
        gc.enable()
