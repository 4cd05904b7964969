"""Latency: against modules whose time is known, counting, and enumeration; a real clock for the order of sizes."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import plasticnet as pn
from plasticnet import Latency, PlasticError, PlasticNet
from plasticnet.apps.models import LeNet5
from plasticnet.measuring import latency
from tests.kit.networks import ConvNet, assert_same, images, mlp, randomise_gates, small, tiny
from tests.kit.processes import everywhere, together


def milliseconds(module: nn.Module) -> float:
    """The time that the tests' modules take: multilinear in the widths, with a constant."""
    own = [m for m in module.modules() if m._parameters]
    return sum(0.3 + sum(0.01 * len(p) + 0.002 * p.numel() for p in m.parameters()) for m in own)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a clock: `milliseconds`. Watching takes a tenth more, as it does in fact."""

    def times_of(run: Any, inputs: Any, watched: Any, repeats: int, device: str) -> dict[str | None, float]:
        run(inputs)
        total = milliseconds(run.args[0])
        times: dict[str | None, float] = {name: 1.1 * milliseconds(m) for name, m in watched.items()}
        if times:
            assert sum(filter(None, times.values())) == pytest.approx(1.1 * total)
        return times or {None: total}

    monkeypatch.setattr(latency, "times_of", times_of)


def expected(net: PlasticNet, pi: Tensor | None = None) -> float:
    pi = torch.ones(sum(map(len, net.sites.values()))) if pi is None else pi
    return float(net.cost.expected(pi.double(), "latency"))


NETWORKS: dict[str, tuple[Any, ...]] = {
    "residual sums, BatchNorm, flatten, concatenation": (ConvNet, images(), {}),
    "input features": (ConvNet, images(), {"inputs": ("fc1", "fc2")}),
    "a square layer": (lambda: tiny(12), torch.randn(2, 2), {}),
    "a sequence": (lambda: mlp(4, 9, 8, 3), torch.randn(2, 4), {"inputs": ("*",)}),
}


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", NETWORKS)
def test_is_exact_where_time_is_multilinear(name: str) -> None:
    make, x, options = NETWORKS[name]
    net = PlasticNet(make(), (x,), **options)
    found = net.measure_latency((x,))
    assert found.worst < 1e-6
    assert found.milliseconds == pytest.approx(milliseconds(net.model))
    assert expected(net) == pytest.approx(milliseconds(net.model))
    for _ in range(5):
        randomise_gates(net, closed=0.6)
        pattern = torch.cat([s.mean_gate(math.inf) for s in net.sites.values()])
        assert expected(net, pattern) == pytest.approx(milliseconds(net.compact()), rel=1e-6)


@pytest.mark.usefixtures("known")
def test_expectation_equals_enumeration() -> None:
    net = PlasticNet(tiny(), (torch.randn(2, 2),))
    net.measure_latency((torch.randn(2, 2),))
    net.k = 1.5
    randomise_gates(net)
    pi = net.sites["a"].probability(1.5).detach().double()
    mean = 0.0
    for pattern in itertools.product([0.0, 1.0], repeat=3):
        z = torch.tensor(pattern, dtype=torch.float64)
        mean += float((pi * z + (1 - pi) * (1 - z)).prod()) * expected(net, z)
    assert expected(net, pi) == pytest.approx(mean, rel=1e-12)
    assert net.penalty(2.0, "latency").item() == pytest.approx(2 * mean, rel=1e-6)
    assert net.penalty(2.0, {"latency": 1.0, "macs": 0.5}, "log").item() == pytest.approx(
        2 * math.log(mean) + net.penalty(1.0, "macs", "log").item(), rel=1e-6
    )


@pytest.mark.usefixtures("known")
def test_gradient_is_the_price_of_each_unit() -> None:
    net = PlasticNet(ConvNet(), (images(),))
    net.measure_latency((images(),))
    randomise_gates(net)
    pattern = torch.cat([s.mean_gate(math.inf) for s in net.sites.values()]).double().requires_grad_()
    net.cost.expected(pattern, "latency").backward()
    assert pattern.grad is not None
    for i in range(len(pattern)):
        other = pattern.detach().clone()
        other[i] = 1 - other[i]
        change = expected(net, other) - expected(net, pattern.detach())
        assert pattern.grad[i].item() == pytest.approx(change * (1 if other[i] else -1), rel=1e-9)


@pytest.mark.usefixtures("known")
def test_passes_gradcheck_with_strengths() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",)).double()
    net.measure_latency((images().double(),))
    net.k = 2.0
    randomise_gates(net)
    phis = [s.phi for s in net.sites.values()]
    assert torch.autograd.gradcheck(lambda *_: net.penalty(0.1, "latency", "log"), phis)


@pytest.mark.usefixtures("known")
def test_the_table_stays_when_the_size_changes() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    keys = net.state_dict().keys()
    net.measure_latency((images(),))
    assert net.state_dict().keys() == keys
    net.resize({"conv1": [0, 2, 5], "fc1": range(4), "fc1.input": range(0, 40, 3)})
    assert expected(net) == pytest.approx(milliseconds(net.model))
    state = net.state_dict()
    net.grow({"conv1": 9, "fc1": 30})  # beyond what was measured
    assert expected(net) == pytest.approx(milliseconds(net.model))
    net.load_state_dict(state)
    assert expected(net) == pytest.approx(milliseconds(net.model))
    net.double()
    assert expected(copy.deepcopy(net)) == pytest.approx(milliseconds(net.model))
    other = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    other.load_state_dict(state)
    with pytest.raises(PlasticError, match="measure_latency"):  # it belongs to a device, not to a state
        other.penalty(1.0, "latency")


@pytest.mark.usefixtures("known")
def test_a_smaller_network_with_closed_units_and_features_can_be_measured() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    net.resize({"fc1.input": range(0, 40, 3), "conv1": range(5)})
    randomise_gates(net)
    found = net.measure_latency((images(),))
    assert found.worst < 1e-6
    assert found.milliseconds == pytest.approx(milliseconds(net.model))


class Blocks(nn.Module):
    """Two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.head = mlp(6, 9, 6), mlp(6, 9, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(x)))


@pytest.mark.usefixtures("known")
def test_a_closed_block_takes_no_time() -> None:
    net = PlasticNet(Blocks(), (torch.randn(3, 6),), blocks=("block?",))
    with torch.no_grad():
        net.sites["depth"].phi[0] = -1.0  # it is measured all the same
    net.measure_latency((torch.randn(3, 6),))
    pattern = torch.cat([s.mean_gate(math.inf) for s in net.sites.values()])
    assert expected(net, pattern) == pytest.approx(milliseconds(net.compact()), rel=1e-6)
    assert expected(net) == pytest.approx(milliseconds(net.model), rel=1e-6)


# -- a real clock -----------------------------------------------------------------------------


def test_wide_networks_take_longer_than_narrow_ones() -> None:
    x = torch.randn(32, 1, 28, 28)
    net = PlasticNet(LeNet5(), (x,))
    found = net.measure_latency((x,), networks=12, repeats=3)
    wide = expected(net)
    assert wide == pytest.approx(found.milliseconds, rel=0.5)
    prices = [expected(net, share * torch.ones(570)) for share in (0.1, 0.3, 0.6, 1.0)]
    assert prices == sorted(prices)
    narrow = copy.deepcopy(net)
    narrow.resize({"conv1": range(4), "conv2": range(8), "fc1": range(40)})
    assert expected(narrow) < 0.5 * wide
    measured = pn.profile(narrow.compact(), (x,)).milliseconds
    assert measured < 0.5 * pn.profile(net.compact(), (x,)).milliseconds


def test_what_is_said_of_it() -> None:
    x = torch.randn(32, 1, 28, 28)
    found = PlasticNet(LeNet5(), (x,)).measure_latency((x,), networks=8, repeats=2)
    assert (found.networks, found.held_out, found.device, found.dtype, found.batch) == (7, 2, "cpu", "float32", 32)
    assert 0 <= found.error <= found.worst < math.inf
    assert found.milliseconds > 0
    assert all(t.milliseconds > 0 and t.rate > 0 for t in found.terms)
    assert {t.module for t in found.terms} <= {"conv1", "conv2", "fc1", "fc2", ""}
    text = str(found)
    assert "conv2" in text
    assert f"error of the prediction {found.error:.1%}, at most {found.worst:.1%}: 2 networks" in text
    assert json.loads(json.dumps(found.as_dict()))["batch"] == 32


class Odd(nn.Module):
    """Grouped, depthwise and transposed convolutions, attention, a recurrent and a bilinear layer, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 64, 1)
        self.grouped = nn.Conv1d(64, 64, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(64, 64, 3, padding=1, groups=64)
        self.up = nn.ConvTranspose1d(64, 64, 2, stride=2)
        self.attention = nn.MultiheadAttention(64, 8, batch_first=True)
        self.lstm = nn.LSTM(64, 48, batch_first=True)
        self.left, self.right = nn.Linear(48, 5), nn.Linear(48, 5)
        self.bilinear = nn.Bilinear(5, 5, 4)
        self.fixed = nn.Linear(48, 48)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.depthwise(self.grouped(self.first(self.fixed(x))).relu()).relu()).transpose(1, 2)
        h = self.attention(h, h, h, need_weights=False)[0]
        h = self.lstm(h)[0].mean(1)
        return self.head(self.scale * self.bilinear(self.left(h).tanh(), self.right(h).tanh()))


def test_odd_shapes() -> None:
    x = torch.randn(16, 4, 48)  # so much that the widths decide about the time
    net = PlasticNet(Odd(), (x,))
    assert len(net.sites) >= 5
    found = net.measure_latency((x,), networks=8, repeats=1)
    assert "fixed" in found.constants
    assert not {t.module for t in found.terms if t.dims} & set(found.constants)
    pi = torch.full((sum(map(len, net.sites.values())),), 0.5)
    assert 0 < expected(net, pi) < expected(net)


def test_leaves_the_network_alone() -> None:
    net = PlasticNet(ConvNet(dropout=0.5), (images(),), inputs=("fc1",))
    randomise_gates(net)
    net.k = 7.0
    net.train()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    parameters = list(net.parameters())
    net.measure_latency((images(),), networks=8, repeats=1)
    assert_same(net.state_dict(), before)
    assert [m.training for m in net.modules()] == modes
    assert all(p is q and p.grad is None for p, q in zip(net.parameters(), parameters, strict=True))
    assert torch.get_num_threads() == threads
    state_after = torch.get_rng_state()
    torch.set_rng_state(state)
    images()  # the argument above
    assert torch.equal(torch.get_rng_state(), state_after)


# -- refused ----------------------------------------------------------------------------------


def test_before_it_is_measured() -> None:
    net, _ = small()
    for k in (2.0, math.inf):
        net.k = k
        for cost in ("latency", {"macs": 1.0, "latency": 1.0}):
            with pytest.raises(PlasticError, match=r"net\.measure_latency"):
                net.penalty(1.0, cost)
    with pytest.raises(PlasticError, match=r"net\.measure_latency"):
        expected(net)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.randn(2, 5), {}, "does not run on the example inputs"),
        (torch.randn(2, 4), {"networks": 7}, "networks=7"),
        (torch.randn(2, 4), {"networks": 8.0}, "networks=8.0"),
        (torch.randn(2, 4), {"repeats": 0}, "repeats=0"),
        (3, {}, "example_inputs"),
        (torch.randn(2, 4, device="meta"), {}, "meta"),
    ],
)
def test_bad_requests_change_nothing(x: Any, options: dict[str, Any], message: str) -> None:
    net, _ = small()
    with pytest.raises(PlasticError, match=message):
        net.measure_latency(x, **options)
    assert net.latency is None


def test_a_network_that_does_not_run_when_it_is_narrow() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 200), nn.Linear(200, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if h.shape[1] < 20:
                raise ValueError("too narrow")
            return self.b(h)

    net = PlasticNet(Picky(), (torch.randn(2, 4),))
    with pytest.raises(PlasticError, match=r"cut to \{'a': \d+\}: too narrow.*exclude"):
        net.measure_latency((torch.randn(2, 4),), networks=8, repeats=1)


def test_plain_data_and_back() -> None:
    net, _ = small()
    found = net.measure_latency((torch.randn(2, 4),), networks=8, repeats=1)
    assert Latency.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    for other in ({}, {"terms": [{}]}, {**found.as_dict(), "terms": 3}):
        with pytest.raises(PlasticError, match="no table of latencies"):
            Latency.from_dict(other)


# -- two processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_ranks_share_the_table_of_the_first(tmp_path: Path) -> None:
    together(tmp_path, table_of_the_first)


def table_of_the_first(rank: int) -> None:
    x = torch.randn(6, 4)
    net = PlasticNet(mlp(4, 6, 5, 3), (x,))
    net.k = 7.0
    own = net.measure_latency((x,), networks=8, repeats=1)
    assert len(set(map(str, everywhere(own)))) == 2  # two clocks
    ddp = DDP(net.train())
    net.expected_loss(lambda: F.cross_entropy(ddp(x), torch.arange(6) % 3, reduction="none"))
    tables = everywhere(net.latency)
    assert tables[0] == tables[1] == (own if rank == 0 else tables[1])
    assert len(set(everywhere(net.penalty(1.0, "latency").item()))) == 1
    found = net.measure_latency((x,), networks=8, repeats=1)  # wrapped: all together
    assert everywhere(found) == [net.latency] * 2


def test_a_time_that_follows_no_gate_has_a_gradient_of_zero() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),))
    found = net.measure_latency((torch.randn(8, 4),), networks=8, repeats=1)
    net.latency = replace(found, terms=tuple(replace(t, dims=()) for t in found.terms))
    net.refresh()
    net.k = 2.0
    net.penalty(1.0, "latency").backward()
    assert all(s.phi.grad is not None and not s.phi.grad.any() for s in net.sites.values())
