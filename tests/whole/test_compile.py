"""torch.compile: the same results, for gates per sample, per batch and none, and after a change of size."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import PlasticError, PlasticNet
from tests.kit.compilers import Backend
from tests.kit.networks import mlp

INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, g++")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*"),  # the compiler's own, many and changing
]


class Normed(nn.Module):
    """A residual stream behind a norm: its statistics are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.body, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.body(self.norm(x)).tanh())


def results(net: PlasticNet, compiled: str | None) -> list[Tensor]:
    """Losses and gradients of a few steps, at infinite and finite k by turns and at another size."""
    torch.compiler.reset()
    if compiled:
        net.compile(backend=compiled, after=0)
    x, y = torch.linspace(-1, 1, 72).reshape(12, 6), torch.arange(12) % 3
    found = []
    for k in (math.inf, 2.0, math.inf, 2.0, "resize", 2.0):
        if k == "resize":
            name = next(iter(net.sites))
            net.resize({name: list(range(1, len(net.sites[name])))})
            continue
        net.k = k
        torch.manual_seed(3)
        net.train()
        net.zero_grad()
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        loss.backward()
        found += [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None), net.eval()(x).detach()]
    return found


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
@pytest.mark.parametrize("gates", ["sample", "batch"])
def test_compiled_equals_written(gates: Any, backend: str) -> None:
    for model, residual in ((mlp(6, 16, 8, 3), False), (Normed(), True)):
        state = {n: t.clone() for n, t in model.state_dict().items()}
        net = PlasticNet(model, (torch.randn(2, 6),), gates=gates, residual=residual)
        expected = results(net, None)
        model = mlp(6, 16, 8, 3) if not residual else Normed()
        model.load_state_dict(state)
        found = results(PlasticNet(model, (torch.randn(2, 6),), gates=gates, residual=residual), backend)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_whole_network_compiled() -> None:
    torch.compiler.reset()
    net = PlasticNet(mlp(6, 16, 3), (torch.randn(2, 6),))
    net.k = 2.0
    net.train()
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    found = []
    for call in (net, torch.compile(net, backend="eager")):
        torch.manual_seed(3)
        net.zero_grad()
        net.expected_loss(lambda call=call: F.cross_entropy(call(x), y, reduction="none")).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def trained(net: PlasticNet, steps: int) -> None:
    """Take training steps at infinite k."""
    x, y = torch.linspace(-1, 1, 72).reshape(12, 6), torch.arange(12) % 3
    net.train()
    for _ in range(steps):
        net.zero_grad()
        net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")).backward()


def test_nothing_is_compiled_before_it_pays() -> None:
    torch.compiler.reset()
    backend, net = Backend(), PlasticNet(mlp(6, 16, 3), (torch.randn(2, 6),))
    net.compile(backend=backend)
    trained(net, 5)
    net.k = 2.0
    trained(net, 5)
    assert backend.graphs == 0
    net.compile(backend=backend, after=0)
    net.k = math.inf
    trained(net, 1)
    assert backend.graphs > 0
    runs = backend.runs
    net.compile(backend=backend)
    trained(net, 5)
    assert backend.runs == runs  # it has begun anew, although the model was compiled before


def test_it_is_compiled_anew_for_every_size_and_never_given_up() -> None:
    """The compiler has a limit of eight recompilations, beyond which it runs code as it was written."""
    torch.compiler.reset()
    backend, net = Backend(), PlasticNet(mlp(6, 32, 3), (torch.randn(2, 6),))
    net.compile(backend=backend, after=0)
    name = next(iter(net.sites))
    for size in range(32, 16, -1):
        net.resize({name: list(range(size))})
        before = backend.runs
        trained(net, 2)
        assert backend.runs >= before + 2


def test_it_goes_back_where_what_is_compiled_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        """A clock on which a day passes between two looks, so that all runs seem long."""

        now = 0.0

        def __call__(self) -> float:
            self.now += 86_400
            return self.now

    class Slow(Backend):
        def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
            run = super().__call__(graph, inputs)

            def later(*args: Any) -> Any:
                clock.now += 86_400
                return run(*args)

            return later

    clock, backend = Clock(), Slow()
    torch.compiler.reset()
    net = PlasticNet(mlp(6, 16, 3), (torch.randn(2, 6),))
    net.compile(backend=backend)
    monkeypatch.setattr("time.perf_counter", clock)
    for _ in range(20):
        trained(net, 20)
        if backend.runs:
            break
    trained(net, 20)
    runs = backend.runs
    assert runs > 0
    trained(net, 20)
    assert backend.runs == runs
    net.resize({"0": list(range(8))})
    trained(net, 3)
    assert backend.runs == runs  # it is remembered at another size


def test_gates_per_sample_run_compiled_beside_ordinary_training() -> None:
    torch.compiler.reset()
    backend, net = Backend(), PlasticNet(mlp(6, 16, 3), (torch.randn(2, 6),), gates="sample")
    net.compile(backend=backend, after=0)
    for k in (2.0, math.inf, 2.0, math.inf):
        net.k = k
        before = backend.runs
        trained(net, 2)
        assert backend.runs >= before + 2


@pytest.mark.parametrize("wrong", [-1, "soon", float("nan")])
def test_when_it_compiles_is_a_number(wrong: Any) -> None:
    net = PlasticNet(mlp(6, 16, 3), (torch.randn(2, 6),))
    with pytest.raises(PlasticError, match="after="):
        net.compile(after=wrong)
