"""Several threads with one network: each sees it whole, or waits."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from plasticnet import PlasticError, PlasticNet, Schedule, Stage
from plasticnet.tools import locks
from tests.kit.networks import assert_same, mlp

X = torch.randn(32, 6)
SWITCH = 1e-5  # seconds after which Python lets another thread run, so that they meet often


@contextmanager
def beside(work: Callable[[], object], threads: int = 1) -> Iterator[list[BaseException]]:
    """Do some work again and again in other threads within this context; the list has what was raised there."""
    stop, errors = threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    work()
            except BaseException as error:
                errors.append(error)
                return

    others = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    for other in others:
        other.start()
    try:
        yield errors
    finally:
        stop.set()
        for other in others:
            other.join(60)
        assert not any(other.is_alive() for other in others)


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    yield
    sys.setswitchinterval(before)


def network(**options: Any) -> PlasticNet:
    net = PlasticNet(mlp(6, 64, 64, 3), (X[:2],), **options)
    net.k = 7.0  # the open gates are 0.95, so that they are multiplied in evaluation, too
    return net


def test_two_threads_evaluate() -> None:
    net = network().eval()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    expected = net(X).detach()

    def evaluate() -> None:
        torch.testing.assert_close(net(X), expected)

    with beside(evaluate, threads=2) as errors:
        for _ in range(50):
            evaluate()
    assert not errors
    assert all(isinstance(p, nn.Parameter) and torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_what_reads_or_changes_the_network_waits_for_a_run() -> None:
    net = network().eval()
    expected = net(X).detach()
    state = {n: t.clone() for n, t in net.state_dict().items()}
    with beside(lambda: torch.testing.assert_close(net(X), expected)) as errors:
        for _ in range(20):
            assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
            assert all(isinstance(p, nn.Parameter) for p in net.parameters())
            assert all(isinstance(p, nn.Parameter) for p in net.param_groups(1e-3)[0]["params"])
            assert all(isinstance(p, nn.Parameter) for p in copy.deepcopy(net).parameters())
            torch.testing.assert_close(net.compact()(X), expected)
            net.load_state_dict(state)
    assert not errors


@pytest.mark.parametrize("gates", ["sample", "batch"])
def test_a_thread_that_serves_beside_one_that_trains(gates: str) -> None:
    """The training is to the bit what it is alone, through changes of size."""

    def train(serve: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = network(gates=gates)
        optimizer = Adam(net.param_groups(1e-2, 0.1))
        schedule = Schedule(net, optimizer, [Stage(2, k=7.0), Stage(1)])
        y = torch.arange(len(X)) % 3
        net.eval()

        def work() -> None:
            assert net(X[:8]).shape == (8, 3)

        with beside(work if serve else lambda: None) as errors:
            for _ in range(schedule.epochs):
                for step in range(5):
                    with net.lock:  # the serving thread evaluates, and so changes the mode
                        net.train()
                        torch.manual_seed(step)
                        loss = net.expected_loss(lambda: F.cross_entropy(net(X), y, reduction="none"))
                        loss = loss + net.penalty(0.3, "macs", "log")
                        net.eval()
                    optimizer.zero_grad()
                    loss.backward()
                    assert all(p.grad is not None for p in net.model.parameters())
                    with net.lock:
                        optimizer.step()
                schedule.step()
        assert not errors
        return net.state_dict()

    assert_same(train(serve=False), train(serve=True))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(2, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.view(len(x), 3, 2))[0][:, -1])


class Paused(nn.Module):
    """Hands its input on, and waits for another thread where it is told to."""

    pause: Callable[[], object] = staticmethod(lambda: None)

    def forward(self, x: Tensor) -> Tensor:
        self.pause()
        return x


def in_another_thread(work: Callable[[], Any]) -> Any:
    """What some work returns in another thread, for which this one waits."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    return found[0]


@pytest.mark.parametrize("what", ["parameters", "state", "copy", "attributes", "clipping"])
@pytest.mark.parametrize("kind", ["units", "recurrent", "single weights", "evaluation", "shared"])
def test_what_another_thread_reads_in_the_model_in_the_middle_of_a_run(kind: str, what: str) -> None:
    """Once, at a moment that is known: the parameters are the model's own, with the gradients of the last step."""
    pause = Paused()
    body = Recurrent() if kind == "recurrent" else mlp(6, 16, 16, 3)
    if kind == "shared":
        body = nn.Sequential(*body, nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3))
        body[-1].weight = body[-4].weight  # pyright: ignore[reportAttributeAccessIssue]
    model = nn.Sequential(body, pause)
    options: dict[str, Any] = {"weights": ("*",)} if kind == "single weights" else {}
    net = PlasticNet(model, (X[:2],), gates="batch", **options)
    net.k = 7.0
    net.expected_loss(lambda: net(X).square().sum(1)).backward()
    net.train(kind != "evaluation")
    own = dict(model.named_parameters())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    norm = torch.stack([p.grad.norm() for p in own.values() if p.grad is not None]).norm()

    def read() -> None:
        if what == "parameters":
            found = dict(model.named_parameters())
            assert found.keys() == own.keys()
            assert all(p is own[n] and p.grad is not None for n, p in found.items())
        elif what == "state":
            assert_same(dict(model.state_dict()), state)
        elif what == "copy":
            twin = copy.deepcopy(body)
            assert all(type(p) is nn.Parameter and torch.equal(p, state[f"0.{n}"]) for n, p in twin.named_parameters())
            assert all(type(vars(m)["_parameters"]) is dict for m in twin.modules())
        elif what == "attributes":
            for name, p in own.items():
                holder, _, leaf = name.rpartition(".")
                assert getattr(model.get_submodule(holder), leaf) is p
        else:
            assert torch.equal(nn.utils.clip_grad_norm_(model.parameters(), 1e9), norm)

    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            read()
        except BaseException as error:
            errors.append(error)

    read()  # as it is when nothing runs
    changed: list[bool] = []

    def pausing() -> None:
        changed.append(any(p is not own[n] for n, p in model.named_parameters()))
        in_another_thread(attempt)

    pause.pause = pausing  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        net(X)
    assert changed == [True]  # the thread that runs finds the gates folded in
    if errors:
        raise errors[0]
    read()


def test_a_forward_that_swaps_parameters_itself() -> None:
    """`torch.func.functional_call` within the model, on what gates are folded into."""

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            held = dict(self.b.named_parameters())
            return torch.func.functional_call(self.b, {**held, "bias": 2 * held["bias"]}, (x,)) + self.b(x)

    net = PlasticNet(Doubled(), (X[:2],), gates="batch")
    assert "a" in net.sites
    net.k = 7.0
    with torch.no_grad():
        net.sites["a"].phi.uniform_(-1, 1)
    before = dict(net.model.named_parameters())
    out = net.eval()(X)
    torch.testing.assert_close(net.compact()(X), out)
    assert all(p is before[n] for n, p in net.model.named_parameters())


def test_another_threads_call_is_no_call_of_the_closure() -> None:
    net = network()
    net.train()
    entered, done = threading.Event(), threading.Event()
    outputs: list[Tensor] = []

    def serve() -> None:
        entered.wait(60)
        outputs.append(net(X[:3]))  # waits until the step is over
        done.set()

    other = threading.Thread(target=serve, daemon=True)
    other.start()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        entered.set()
        assert not done.wait(0.05)
        return net(X).square().sum(1)

    net.expected_loss(closure).backward()  # another number of samples in between would have been refused
    other.join(60)
    assert done.is_set()
    assert calls > 1
    assert outputs[0].shape == (3, 3)


def test_a_closure_that_waits_for_another_thread_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    net = network()
    raised: list[BaseException] = []

    def closure() -> Tensor:
        def call() -> None:
            try:
                net(X)
            except PlasticError as error:
                raised.append(error)

        worker = threading.Thread(target=call)
        worker.start()
        worker.join()
        return net(X).square().sum(1)

    net.train().expected_loss(closure)
    assert "from its own thread" in str(raised[0])


def test_copies_have_locks_of_their_own() -> None:
    net = network()
    with net.lock:
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            results: list[Tensor] = []
            thread = threading.Thread(target=lambda twin=twin, results=results: results.append(twin.eval()(X)))
            thread.start()
            thread.join(60)
            assert results


def test_checkpoints_of_other_networks_are_left_alone() -> None:
    """A plain model in another thread, with reentrant checkpoints, beside a network under gates."""
    net, plain = network(), mlp(6, 16, 3)
    net.train()
    x = X.clone().requires_grad_()

    def reentrant() -> None:
        with torch.enable_grad():
            checkpoint(plain, x, use_reentrant=True).sum().backward()  # pyright: ignore[reportAttributeAccessIssue]

    with beside(reentrant) as errors:
        for _ in range(20):
            net.expected_loss(lambda: net(X).square().sum(1)).backward()
    assert not errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_data_parallel_is_refused() -> None:
    with pytest.raises(PlasticError, match="DistributedDataParallel"):
        torch.nn.parallel.replicate(network().cuda(), [0, 0])
