"""compact equals eval, exactly, on generated networks."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ConvNet, images, randomise_gates
from generated import Generated, networks, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plasticnet import PlasticError, PlasticNet, Take


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-300))


def plain(module: nn.Module) -> bool:
    for m in module.modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks:
            return False
        if type(m).__module__.startswith("plasticnet") and not isinstance(m, Take):
            return False
    return True


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    model=networks,
    k=st.sampled_from([0.0, 0.5, 7.0, math.inf]),
    inputs=st.sampled_from([(), ("fc1",), ("fc*",)]),
    seed=st.integers(0, 2**20),
    closed=st.sampled_from([0.2, 0.5, 0.9]),
)
def test_compact_equals_eval(model: Generated, k: float, inputs: tuple[str, ...], seed: int, closed: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    net = PlasticNet(randomise(model), (x,), inputs=inputs)
    assert "fc2" in net.frozen
    randomise_gates(net, closed)
    net.k = k
    net.eval()
    small = net.compact()
    assert plain(small)
    assert error(net(x), small(x)) <= 1e-9
    summary = net.summary()
    if k != 0 and all(s.open > 0 for s in summary.sites):
        features = net.sites.get("fc1.input")
        if features is None:
            assert sum(p.numel() for p in small.parameters()) == summary.open_parameters
        else:
            assert sum(p.numel() for p in small.parameters()) <= summary.parameters
    # And what remains can be resized again: growing leaves the outputs alone.
    before = net(x)
    net.prune(0.5)
    net.grow({n: 1 for n, s in net.sites.items() if s.units.growable and not n.endswith(".input")})
    assert error(before, net(x)) <= 1e-9
    assert error(before, net.compact()(x)) <= 1e-9


def test_compact_is_a_copy_and_trains() -> None:
    model = ConvNet()
    net = PlasticNet(model, (images(),), inputs=("fc1",))
    randomise_gates(net)
    small = net.compact()
    assert isinstance(small.get_submodule("fc1"), nn.Sequential)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()
    small(images()).pow(2).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert all(p.grad is not None for p in small.parameters())


def test_a_channel_whose_features_are_all_closed_is_cut() -> None:
    net = PlasticNet(ConvNet(norm=False), (images(),), inputs=("fc1",))
    with torch.no_grad():  # conv3 makes the last 16 of the 40 features
        net.sites["fc1.input"].phi[28:32] = -1.0
    small = net.compact()
    assert small.get_parameter("conv3.weight").shape[0] == 3
    net.eval()
    x = images()
    torch.testing.assert_close(net(x), small(x))


def test_a_site_with_every_unit_closed_keeps_one_of_weight_zero() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",)).double()
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.fill_(-1.0)
    net.eval()
    x = images().double()
    small = net.compact()
    assert error(net(x), small(x)) <= 1e-9
    assert small.get_parameter("conv2.weight").shape[1] == 1


def test_dtypes_and_memory_format_survive() -> None:
    model = ConvNet().to(memory_format=torch.channels_last)
    net = PlasticNet(model, (images(),))
    randomise_gates(net)
    small = net.compact()
    assert small.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)
    half = PlasticNet(ConvNet(norm=False).bfloat16(), (images().bfloat16(),))
    randomise_gates(half)
    assert half.sites["conv1"].phi.dtype == torch.float32
    assert half.compact()(images().bfloat16()).dtype == torch.bfloat16


def test_consumer_that_no_module_call_reads_is_gated_through_its_weight() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)
            self.w = nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).tanh() @ self.w.t()

    net = PlasticNet(Functional().double(), (torch.randn(5, 4, dtype=torch.float64),))
    assert list(net.sites) == ["a"]
    net.k = 2.0
    randomise_gates(net)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert error(net.eval()(x), net.compact()(x)) <= 1e-9
    net.train()
    (net.expected_loss(lambda: net(x).pow(2).sum(1))).backward()
    assert net.sites["a"].phi.grad is not None


def test_exclude_and_unknown_operation() -> None:
    net = PlasticNet(ConvNet(), (images(),), exclude=("conv*",))
    assert list(net.sites) == ["fc1"]
    assert net.excluded == ("conv1", "conv3")
    with pytest.raises(PlasticError):
        PlasticNet(ConvNet(), (images(),), exclude=("*",))
