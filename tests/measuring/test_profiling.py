"""The profile: memory against networks whose answer can be worked out, time by a clock that the test moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import plasticnet as pn
from plasticnet import ModuleProfile, PlasticError, PlasticNet, profile
from plasticnet.apps.models import LeNet5
from plasticnet.measuring import profiling, timing
from plasticnet.tools.table import readable_bytes
from tests.kit.networks import ConvNet, assert_same, images, mlp, randomise_gates, small

FLOAT = 4  # bytes


def rows(found: pn.Profile) -> dict[str, ModuleProfile]:
    return {row.name: row for row in found.rows}


class Of(nn.Module):
    """A forward of a test's own over two layers, 4 to 6 and 6 to 6."""

    def __init__(self, forward: Callable[[Of, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self._forward = nn.Linear(4, 6), nn.Linear(6, 6), forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


X = torch.randn(5, 4)
H = 5 * 6 * FLOAT  # what a layer of `Of` returns


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "first", "second", "kept"),
    [
        (lambda m, x: m.b(m.a(x)), H, 2 * H, H),  # b keeps its input; a keeps x, which does not count
        (lambda m, x: m.b(m.a(x).relu()), 2 * H, 2 * H, H),  # a's output is freed; relu and b keep the same
        (lambda m, x: m.b(m.a(x).relu_()), H, 2 * H, H),
        (lambda m, x: m.b(m.a(x).sin()), 2 * H, 2 * H, 2 * H),  # sin keeps its input, b what it read
        (lambda m, x: (h := m.a(x)) + m.b(h), H, 3 * H, H),  # h stays until the end
        (lambda m, x: m.b(m.a(x).view(6, 5).t().view(5, 6)), H, 2 * H, H),  # views cost nothing
        (lambda m, x: m.b(m.a(x).t().contiguous().t()), 2 * H, 2 * H, H),  # a copy does
        (lambda m, x: m.b((h := m.a(x)) * h), 2 * H, 3 * H, 2 * H),  # h is kept once
        (lambda m, x: m.b(m.a(x)) * m.a.bias, H, 2 * H, 2 * H),  # a parameter that is kept does not count
        (lambda m, x: [m.b(m.a(x)) for _ in range(3)], 3 * H, 4 * H, 3 * H),  # two results, then a's and b's
    ],
)
def test_memory(forward: Callable[[Of, Tensor], Any], first: int, second: int, kept: int) -> None:
    found = profile(Of(forward), X, repeats=1, training=True)
    assert (rows(found)["a"].peak_bytes, rows(found)["b"].peak_bytes) == (first, second)
    assert found.peak_bytes == max(first, second)
    assert found.kept_bytes == kept


def test_memory_of_convolutions() -> None:
    found = profile(LeNet5(), torch.randn(3, 1, 28, 28), repeats=1)
    conv1, pooled, conv2 = 20 * 24 * 24, 20 * 12 * 12, 50 * 8 * 8
    least = 3 * FLOAT * (conv1 + pooled)
    assert least <= rows(found)["conv1"].peak_bytes == found.peak_bytes <= 3 * FLOAT * (2 * conv1 + 3 * pooled)
    assert rows(found)["conv2"].peak_bytes >= 3 * FLOAT * (pooled + conv2)
    assert rows(found)["fc2"].peak_bytes == 3 * FLOAT * (800 + 500 + 10)  # the 800 are a variable of the forward


def test_memory_does_not_grow_with_depth() -> None:
    peaks = [profile(mlp(*[6] * n), torch.randn(5, 6), repeats=1).peak_bytes for n in (3, 30)]
    assert peaks == [2 * H, 2 * H]


def test_memory_scales_with_the_batch() -> None:
    one, ten = (profile(mlp(4, 6, 3), torch.randn(n, 4), repeats=1, training=True) for n in (1, 10))
    assert (ten.peak_bytes, ten.kept_bytes) == (10 * one.peak_bytes, 10 * (one.kept_bytes or 0))
    assert (ten.macs, ten.parameters) == (one.macs, one.parameters)
    assert (one.batch, ten.batch) == (1, 10)


def test_a_closed_gate_costs_memory_until_it_is_cut() -> None:
    net, _ = small()
    with torch.no_grad():
        net.sites["0"].phi[:3] = -1.0
    x = torch.randn(5, 4)
    before = profile(net, x, repeats=1)
    net.prune()
    after = profile(net, x, repeats=1)
    compact = profile(net.compact(), x, repeats=1)
    gates = FLOAT * 12  # and the constant 1
    assert before.peak_bytes > after.peak_bytes >= compact.peak_bytes + FLOAT * (3 + 5 + 1)
    assert before.peak_bytes >= 2 * H + gates
    assert compact.peak_bytes == 5 * FLOAT * 2 * 5  # the second layer and its tanh


# -- parameters and multiply-adds -------------------------------------------------------------


def test_sizes_are_those_of_the_summary() -> None:
    x = images()
    net = PlasticNet(ConvNet(), (x,), inputs=("fc1",))
    net.k = 7.0
    randomise_gates(net)
    before = profile(net, (x,), repeats=1)
    summary = net.summary()
    assert (before.parameters, before.macs) == (summary.parameters, summary.macs)
    compact = net.compact()
    after = profile(compact, (x,), repeats=1)
    assert (after.parameters, after.macs) == (sum(p.numel() for p in compact.parameters()), summary.open_macs)
    for found in (before, after):
        assert sum(row.parameters for row in found.rows) == found.parameters
        assert sum(row.macs for row in found.rows) == found.macs
        assert max(row.peak_bytes for row in found.rows) == found.peak_bytes
    assert [row.name for row in before.rows] == ["conv1", "bn1", "conv2", "conv3", "fc1", "fc2"]
    assert [row.name for row in after.rows] == ["conv1", "bn1", "conv2", "conv3", "fc1.1", "fc2"]
    assert rows(before)["conv1"].macs == 16 * 6 * 27
    assert rows(before)["conv1"].sites == rows(before)["bn1"].sites == rows(before)["conv2"].sites == ("conv1",)
    assert rows(before)["conv3"].sites == ("conv3",)
    assert rows(before)["fc2"].sites == ()
    assert all(row.sites == () for row in after.rows)


class Parts(nn.Module):
    """Modules that are not called: ``out_proj``, a weight's parametrization, an auxiliary head in evaluation. One
    layer is called twice, one is registered twice, and a parameter lies in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.twice = nn.Linear(8, 8)
        self.alias = self.twice
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        x = self.alias(self.normed(self.twice(self.attention(x, x, x)[0])))
        return self.head(x) if self.training else x


def test_parameters_of_modules_that_are_not_called() -> None:
    found = profile(Parts(), torch.randn(2, 5, 8), repeats=1)
    assert [(row.name, row.parameters) for row in found.rows] == [
        ("", 8 + 8 * 3 + 3),  # the head, too: nothing nearer ran
        ("attention", 4 * (8 * 8 + 8)),
        ("twice", 8 * 8 + 8),
        ("normed", 8 * 8 + 8 + 8),
    ]
    assert rows(found)["twice"].macs == 2 * 5 * 8 * 8
    assert "(the model)" in str(found)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)) for _ in range(2)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def test_a_closed_block_is_skipped_but_there() -> None:
    net = PlasticNet(Blocks(), (X,), blocks=("blocks.?",))
    with torch.no_grad():
        net.sites["blocks.depth"].phi[0] = -1.0
    found = profile(net, (X,), repeats=1)
    assert rows(found)["blocks.0"].macs == 0
    assert rows(found)["blocks.0"].parameters == 6 * 7 + 7 + 7 * 6 + 6
    assert found.macs == net.summary().open_macs == profile(net.compact(), (X,), repeats=1).macs


# -- time -------------------------------------------------------------------------------------


class Busy(nn.Module):
    """Moves the clock by what is next in a list."""

    def __init__(self, clock: list[int], *milliseconds: int) -> None:
        super().__init__()
        self.weight, self.clock, self.milliseconds = nn.Parameter(torch.ones(())), clock, list(milliseconds)

    def __deepcopy__(self, memo: Any) -> Busy:
        return self  # the clock and the list are those of the test

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += 1_000_000 * (self.milliseconds.pop(0) if self.milliseconds else 0)
        return x * self.weight


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [0]
    monkeypatch.setattr(timing, "stamp", lambda device: now[0])
    monkeypatch.setattr(profiling, "trace", lambda *_: pn.trace(nn.Linear(1, 1), torch.ones(1, 1)))
    return now


def test_time(clock: list[int]) -> None:
    # Two runs to warm up, three for the total, three for the rows: medians 30 + 2 and 7 and 5, then 8.
    first = Busy(clock, 900, 900, 10, 70, 30, 7, 99, 1)
    second = Busy(clock, 900, 900, 0, 0, 2, 5, 4, 50)
    between = Busy(clock, 0, 0, 0, 0, 0, 3, 3, 3)
    del between.weight  # no row: its time is that of the module before it
    between.weight = torch.ones(())
    found = profile(nn.Sequential(first, between, second), torch.ones(2), repeats=3)
    assert found.milliseconds == 32
    assert {row.name: row.milliseconds for row in found.rows} == {"0": 10, "2": 5}


def test_time_of_a_module_that_is_called_twice(clock: list[int]) -> None:
    busy = Busy(clock, 0, 0, 0, 0, 0, 0, 3, 4)
    (row,) = profile(nn.Sequential(busy, nn.Sequential(busy)), torch.ones(2), repeats=1).rows
    assert row.milliseconds == 7


def test_time_of_training(clock: list[int]) -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            clock[0] += 20_000_000
            return grad

    class Both(Busy):
        def forward(self, x: Tensor) -> Tensor:
            return Slow.apply(super().forward(x)) if self.training else super().forward(x)

    busy = Both(clock, 0, 0, 1, 0, 0, 5)  # once for each: two to warm up, total, rows, what is kept, training
    found = profile(busy, torch.ones(2), repeats=1, training=True)
    assert (found.milliseconds, found.training_milliseconds) == (1, 25)


def test_time_is_measured() -> None:
    found = profile(mlp(64, 256, 4), torch.randn(64, 64), training=True)
    assert 0 < found.milliseconds < (found.training_milliseconds or 0)
    assert all(row.milliseconds > 0 for row in found.rows)


def test_one_thread_computes() -> None:
    seen: list[int] = []

    def forward(m: Of, x: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return m.a(x)

    torch.set_num_threads(2)
    profile(Of(forward), X, repeats=1, training=True)
    assert seen[-6:] == [1] * 6  # all that is measured; tracing comes before
    assert torch.get_num_threads() == 2


# -- what it leaves alone ---------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, float("inf"), 7.0])
def test_nothing_is_left_behind(k: float | None) -> None:
    x = images()
    model: nn.Module = ConvNet(dropout=0.5)
    if k is not None:
        model = PlasticNet(model, (x,))
        model.k = k
        randomise_gates(model)
    model.train()
    model.get_submodule("bn1" if k is None else "model.bn1").eval()
    model(x).sum().backward()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.set_num_threads(2)

    def state() -> Any:
        parameters = [(p, id(p), p.grad, p.requires_grad) for p in model.parameters()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
        extra = (model.sampler.running, model.sampler.running.calls) if isinstance(model, PlasticNet) else ()
        return [
            parameters,
            list(model.buffers()),
            hooks,
            torch.get_rng_state(),
            torch.get_num_threads(),
            *map(id, extra),
        ]

    before = [torch.clone(t) if isinstance(t, Tensor) else t for t in state()]
    buffers, values = [b.clone() for b in model.buffers()], [p.detach().clone() for p in model.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    inputs = x.clone()
    profile(model, (x,), repeats=2, training=True)
    assert_same(before, state())
    assert_same([buffers, values, gradients], [list(model.buffers()), [p.detach() for p in model.parameters()],
                                               [p.grad for p in model.parameters()]])  # fmt: skip
    assert torch.equal(x, inputs)
    assert torch.is_grad_enabled()


def test_inputs_that_are_changed_in_place() -> None:
    x = torch.ones(5, 4)
    profile(Of(lambda m, x: m.a(x.add_(1))), x, repeats=3, training=True)
    assert torch.equal(x, torch.ones(5, 4))


# -- what it says -----------------------------------------------------------------------------


def test_inputs_by_name_and_results_in_containers() -> None:
    model = Of(lambda m, x: {"b": (m.b(m.a(x)), "text"), "x": x})
    found = profile(model, {"x": X}, training=True)
    assert found.kept_bytes == H


def test_as_dict_and_as_text() -> None:
    net, _ = small()
    found = profile(net, X, repeats=1)
    data = json.loads(json.dumps(found.as_dict()))
    assert data == found.as_dict()
    assert [row["sites"] for row in data["rows"]] == [["0"], ["2"], []]
    assert data["kept_bytes"] is data["training_milliseconds"] is None
    text = str(found).splitlines()
    assert text[0].split() == ["module", "parameters", "MACs", "peak", "memory", "ms"]
    assert text[1].split()[:3] == ["0", "30", "24"]
    assert text[-1].startswith("83 parameters, 69 MACs for one sample; a forward pass of 5 takes ")
    assert "backward" not in text[-1]
    assert "it keeps 120 B for the backward pass" in str(profile(Of(lambda m, x: m.b(m.a(x))), X, training=True))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")],
)
def test_readable_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_a_module_without_parameters() -> None:
    found = profile(nn.Identity(), X)
    assert (found.parameters, found.macs, found.peak_bytes, found.rows) == (0, 0, 0, ())


# -- what it refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "inputs", "options", "message"),
    [
        (mlp(4, 3), X.to("meta"), {}, "meta device"),
        (mlp(4, 3).to("meta"), X.to("meta"), {}, "meta device"),
        (mlp(4, 3), torch.randn(5, 3), {}, "does not run on the example inputs"),
        (mlp(4, 3), X, {"repeats": 0}, "repeats=0"),
        (mlp(4, 3), X, {"repeats": True}, "repeats=True"),
        (mlp(4, 3).requires_grad_(False), X, {"training": True}, "requires a gradient"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), X[:1], {"training": True}, "a batch of two or more"),
    ],
)
def test_refused(module: nn.Module, inputs: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlasticError, match=message):
        profile(module, inputs, **options)


def test_a_network_with_other_inputs_is_refused() -> None:
    net, _ = small()
    with pytest.raises(PlasticError, match="does not run on the example inputs"):
        profile(net, torch.randn(5, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda() -> None:
    found = profile(Of(lambda m, x: m.b(m.a(x).relu())).cuda(), X.cuda(), training=True)
    assert (found.device, found.peak_bytes, found.kept_bytes) == ("cuda", 2 * H, H)
    assert 0 < found.milliseconds < (found.training_milliseconds or 0)
    assert all(row.milliseconds > 0 for row in found.rows)
