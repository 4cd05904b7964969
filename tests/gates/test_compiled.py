"""Gates per sample act by hooks; with compile() such runs are compiled too, once for each kind, and are the same."""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import PlasticNet
from plasticnet.gates.compiled import HookedCalls
from plasticnet.gates.tiers import Tiers
from tests.kit.compilers import Backend
from tests.kit.networks import ConvNet, mlp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*"),  # the compiler's own, many and changing
]


class Residual(nn.Module):
    """A small ResNet: a stem, three blocks of two convolutions, the second and third with a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2), Block(6, 8, 2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem(x)).relu())
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.short(x)).relu()


class Broken(nn.Module):
    """A model that the compiler cannot make one graph of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        torch._dynamo.graph_break()
        return self.b(x)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def data(shape: tuple[int, ...], n: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(n) % 3


def step(net: PlasticNet, x: Tensor, y: Tensor) -> Tensor:
    net.zero_grad()
    loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    loss.backward()
    return loss.detach()


def results(net: PlasticNet, x: Tensor, y: Tensor) -> list[Tensor]:
    """Losses, all gradients, buffers and evaluations of a few steps, with a change of size among them."""
    found = []
    torch.manual_seed(3)
    for k in (2.0, 3.0, float("inf"), 2.0, None, 2.0, 2.5):
        if k is None:
            name = next(iter(net.sites))
            net.resize({name: list(range(1, len(net.sites[name])))})
            continue
        net.k = k
        net.train()
        found.append(step(net, x, y))
        found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        found += [b.clone() for b in net.buffers()]
        found.append(net.eval()(x).detach())
    return found


MODELS = {"mlp": (lambda: mlp(6, 16, 8, 3), (6,)), "cnn": (ConvNet, (3, 4, 5)), "resnet": (Residual, (3, 8, 8))}
INDUCTOR = pytest.param(
    "mlp", "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, g++")
)


@pytest.mark.parametrize(("name", "backend"), [*product(MODELS, ["eager", "aot_eager"]), INDUCTOR])
def test_compiled_is_what_was_written(name: str, backend: str) -> None:
    make, shape = MODELS[name]
    x, y = data(shape)
    torch.manual_seed(0)
    model = make().double()
    net = PlasticNet(deepcopy(model), (x[:2],), gates="sample")
    expected = results(net, x, y)
    net = PlasticNet(model, (x[:2],), gates="sample")
    net.compile(backend=backend, after=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "under gates per sample")
        found = results(net, x, y)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Half(Tiers):
    """Only runs with gradients run compiled, or only those without, as where one kind is compiled before the other."""

    def __init__(self, gradients: bool) -> None:
        super().__init__(0.0, hooked=HookedCalls({"backend": "eager"}))
        self.gradients = gradients

    def compiles(self, kind: Any, batch: int, fixed: bool) -> bool:
        return torch.is_grad_enabled() == self.gradients


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("gates", ["sample", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_some_passes_of_a_step_compiled(name: str, gates: Any, gradients: bool) -> None:
    make, shape = MODELS[name]
    x, y = data(shape)
    torch.manual_seed(0)
    model = make().double()
    expected = results(PlasticNet(deepcopy(model), (x[:2],), gates=gates), x, y)
    net = PlasticNet(model, (x[:2],), gates=gates)
    net.compile(backend="eager")
    net.tiers = Half(gradients)
    net.refresh()
    found = results(net, x, y)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def per_sample(backend: Any, model: nn.Module | None = None) -> PlasticNet:
    net = PlasticNet((model or mlp(6, 16, 8, 3)).double(), (data((6,))[0],), gates="sample")
    net.compile(backend=backend, after=0)
    net.k = 2.0
    return net.train()


def test_draws_k_and_epochs_compile_nothing_anew() -> None:
    backend = Backend()
    net, (x, y) = per_sample(backend), data((6,))
    step(net, x, y)
    graphs = backend.graphs
    for k in (2.0, 2.5, 3.0, 7.0, 20.0):
        net.k = k
        for _ in range(3):
            before = backend.runs
            step(net, x, y)
            assert backend.runs >= before + 2  # both passes of the estimator
    assert backend.graphs == graphs


def test_runs_without_hooks_are_no_such_runs() -> None:
    """By turns with gates and without, evaluation in between: none takes what was compiled for another."""
    net, (x, y) = per_sample(Backend()), data((6,))
    twin = PlasticNet(mlp(6, 16, 8, 3).double(), (x,), gates="sample")
    twin.load_state_dict(net.state_dict())
    for k in (2.0, float("inf"), 2.0, float("inf")):
        for n in (net, twin):
            n.k = k
            n.train()
        torch.manual_seed(5)
        one = step(net, x, y)
        torch.manual_seed(5)
        torch.testing.assert_close(one, step(twin, x, y), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(x), twin.eval()(x), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(net.model(x), twin.model(x), rtol=1e-12, atol=1e-12)
    assert not any(m._forward_pre_hooks for m in net.model.modules())


def test_another_model_of_the_class_was_compiled_without_hooks() -> None:
    backend = Backend()
    other = mlp(6, 16, 8, 3).double()
    x, y = data((6,))
    torch.compile(other, backend=backend)(x).sum().backward()
    net = per_sample(backend, deepcopy(other))
    torch.manual_seed(5)
    compiled = step(net, x, y)
    twin = PlasticNet(other, (x,), gates="sample")
    twin.k = 2.0
    torch.manual_seed(5)
    torch.testing.assert_close(compiled, step(twin.train(), x, y), rtol=1e-12, atol=1e-12)


def test_a_ragged_last_batch_is_not_compiled_without_end() -> None:
    backend = Backend()
    net, (x, y) = per_sample(backend), data((6,))
    step(net, x, y)
    graphs, runs = backend.graphs, backend.runs
    for n in (7, 5, 9, 4, 11, 3):
        step(net, x[:n], y[:n])
    assert (backend.graphs, backend.runs) == (graphs, runs)  # these run as written
    step(net, x, y)
    assert backend.graphs == graphs
    assert backend.runs > runs


def test_what_is_no_single_graph_goes_on_as_written_and_says_so() -> None:
    x, y = data((6,))
    net = per_sample(Backend(), Broken())
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="under gates per sample the model goes on as it was written"):
        found = step(net, x, y)
    twin = PlasticNet(Broken().double(), (x,), gates="sample")
    twin.load_state_dict(net.state_dict())
    torch.manual_seed(5)
    torch.testing.assert_close(found, step(twin.train(), x, y), rtol=1e-12, atol=1e-12)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "under gates per sample")
        step(net, x, y)  # it was said once


def test_another_thread_waits_while_one_compiles() -> None:
    """It must not find the network in the middle of a run, with hooks, when the compiler is at work in that run."""
    begun, found = threading.Event(), []

    class Waiting(Backend):
        def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
            begun.set()
            time.sleep(0.5)  # the other thread asks for the network now
            return super().__call__(graph, inputs)

    net, (x, y) = per_sample(Waiting()), data((6,))
    expected = net.compact()(x).detach()

    def evaluate() -> None:
        begun.wait()
        small = net.compact()
        found.append((small(x).detach(), sum(len(m._forward_pre_hooks) for m in small.modules())))

    thread = threading.Thread(target=evaluate)
    thread.start()
    step(net, x, y)
    thread.join()
    ((output, hooks),) = found
    torch.testing.assert_close(output, expected)
    assert hooks == 0


def test_a_compiled_network_is_copied_and_saved(tmp_path: Any) -> None:
    net, (x, y) = per_sample(Backend()), data((6,))
    step(net, x, y)
    torch.save(net, tmp_path / "net.pt")
    for other in (deepcopy(net), torch.load(tmp_path / "net.pt", weights_only=False)):
        torch.manual_seed(5)
        expected = step(net, x, y)
        torch.manual_seed(5)
        torch.testing.assert_close(step(other, x, y), expected, rtol=1e-12, atol=1e-12)
