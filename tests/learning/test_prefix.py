"""What comes before the first gate is computed once, and nothing else changes by it."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from sys import getrefcount
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from plasticnet import PlasticNet
from plasticnet.apps.models import LeNet5
from plasticnet.learning.prefix import Prefix


class Counts(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2


@pytest.fixture(scope="module")
def doubled() -> Any:
    """A function that no mode sees, not even within."""

    def double(x: Tensor) -> Tensor:
        return x * 2

    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(double)


class Own(nn.Module):
    """A function of its own, and a write into its result."""

    def forward(self, x: Tensor) -> Tensor:
        y = Double.apply(x)
        assert isinstance(y, Tensor)
        y[:, 0] = 0.0
        return y


class Counting(nn.Module):
    """A buffer that counts the batches, and is used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1  # pyright: ignore[reportOperatorIssue]
        return x * (1 + self.seen / 10)  # pyright: ignore[reportOperatorIssue]


class Residual(nn.Module):
    """The result of the prefix is used again behind the first gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.last(x + self.second(x).relu())


class Twice(nn.Module):
    """A layer before the first gate runs behind it, too: dropout, statistics and buffers must go on from there."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3), Counting())
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.before(self.body(self.before(x))))


class PartlyFixed(nn.Module):
    """No gradients from before the first gate until behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.second(self.first(x.tanh()))
        return self.last(x)


def chain(*first: nn.Module) -> nn.Module:
    return nn.Sequential(*first, nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "dropout": lambda: chain(nn.Dropout(0.5)),
    "batchnorm": lambda: chain(nn.BatchNorm1d(6)),
    "own function": lambda: chain(nn.Tanh(), Own()),
    "buffer": lambda: chain(Counting()),
    "spectral norm": lambda: chain(spectral_norm(nn.Linear(6, 6))),
    "in place": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
    "residual": Residual,
    "twice": Twice,
    "no gradients": PartlyFixed,
}


NOT_FOLLOWED = {"own function", "spectral norm", "no gradients"}


def step(net: PlasticNet, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of one step, and everything that it changes."""
    torch.manual_seed(1)
    loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    net.zero_grad()
    loss.backward()
    found = {f"gradient of {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    found.update((n, b.clone()) for n, b in net.named_buffers())
    return {**found, "loss": loss.detach(), "random numbers": torch.get_rng_state()}


@pytest.mark.parametrize("gates", ["sample", "batch"])
@pytest.mark.parametrize("estimator", ["disarm", "loorf"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_nothing_changes_by_it(name: str, estimator: str, gates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    replayed: list[bool] = []
    results = []
    for replays in (Prefix.replays, lambda prefix, inputs, last: False):

        def ask(prefix: Prefix, inputs: Any, last: bool = True, replays: Callable[..., bool] = replays) -> bool:
            replayed.append(replays(prefix, inputs, last))
            return replayed[-1]

        monkeypatch.setattr(Prefix, "replays", ask)
        torch.manual_seed(0)
        net = PlasticNet(NETWORKS[name](), (x,), estimator=estimator, gates=gates)
        net.k = 3.0
        net.train()
        results.append([step(net, x, y) for _ in range(3)])
    assert any(replayed) or name in NOT_FOLLOWED
    for once, twice in zip(*results, strict=True):
        assert once.keys() == twice.keys()
        assert any(n.startswith("gradient of gates") and bool(g.any()) for n, g in once.items())
        for key, value in once.items():
            assert torch.equal(value, twice[key]), key


def test_a_result_that_was_dropped_and_is_read_all_the_same(doubled: Any) -> None:
    """By a function that no mode sees: then the pass is run as it is, and from then on all results are kept."""

    class Hidden(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how
            self.before, self.body, self.last = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = doubled(self.before(x))  # only the function saw its input
            x = self.last(self.body(x).relu())
            return {"read": lambda: x + hidden[:, :3], "returned": lambda: (x, hidden), "lost": lambda: x}[self.how]()

    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    for how in ("read", "returned", "lost"):
        results, kept = [], []
        for replays in (Prefix.replays, lambda *_, **__: False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Prefix, "replays", replays)
                torch.manual_seed(0)
                net = PlasticNet(Hidden(how), (x,), gates="batch")
                net.k = 3.0
                net.train()

                def closure(net: PlasticNet = net) -> Tensor:
                    out = net(x)
                    out, hidden = out if isinstance(out, tuple) else (out, 0.0 * out)
                    return F.cross_entropy(out, y) + hidden.square().mean()

                for _ in range(3):
                    torch.manual_seed(1)
                    net.zero_grad()
                    loss = net.expected_loss(closure)
                    loss.backward()
                    results.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
                kept.append(net.gating.keep_results)
        assert kept[0] or how == "lost"
        for once, twice in zip(results[:3], results[3:], strict=True):
            for one, other in zip(once, twice, strict=True):
                assert torch.equal(one, other), how


def test_only_what_is_still_held_is_kept() -> None:
    x, y = torch.randn(4, 1, 28, 28), torch.randint(0, 10, (4,))
    net = PlasticNet(LeNet5(), (x,))
    net.k = 7.0
    net.train()
    seen: list[list[bool]] = []
    drop = Prefix.drop
    with pytest.MonkeyPatch.context() as patch:

        def watched(prefix: Prefix) -> None:
            drop(prefix)
            seen.append([result.is_meta for *_, result in prefix.steps])

        patch.setattr(Prefix, "drop", watched)
        step(net, x, y)
    # Pooling is read next, and the graph holds what relu returned, where torch counts that as a reference.
    hidden = torch.randn(1, 1, 2, 2, requires_grad=True).relu()
    before = getrefcount(hidden)
    pooled = F.max_pool2d(hidden, 2)
    counted = getrefcount(hidden) > before
    assert pooled.requires_grad
    assert seen[-1] == [True, not counted, False]
    assert not net.gating.keep_results


def test_the_first_layer_runs_once() -> None:
    x, y = torch.randn(4, 1, 28, 28), torch.randint(0, 10, (4,))
    net = PlasticNet(LeNet5(), (x,))
    net.k = 7.0
    net.train()
    step(net, x, y)
    with Counts() as counts:
        net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    assert counts.counts["aten.convolution"] == 3
    with Counts() as counts:  # the inputs are made in the closure: they could be others in the second pass
        net.expected_loss(lambda: F.cross_entropy(net(x + 0), y, reduction="none"))
    assert counts.counts["aten.convolution"] == 4


def test_a_pass_that_goes_another_way_is_run_as_it_is() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x.relu() if self.calls % 2 else x.tanh())

    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    net = PlasticNet(Alternating(), (x,), gates="sample")
    net.k = 3.0
    net.train()
    net.model.calls = 0  # pyright: ignore[reportAttributeAccessIssue]
    step(net, x, y)
    # relu in the first pass; the second began with tanh, diverged, and was run again from the start, with relu
    assert net.model.calls == 3


def test_a_result_changed_in_place_behind_the_gate_is_not_handed_out() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x.mul_(self.second(x.tanh()).sigmoid()))

    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    results = []
    for mend in (False, True):
        torch.manual_seed(0)
        net = PlasticNet(InPlace(), (x,), gates="batch")
        net.k = 3.0
        net.train()
        with pytest.MonkeyPatch.context() as patch:
            if mend:
                patch.setattr(Prefix, "replays", lambda *_, **__: False)
            results.append(step(net, x, y))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


class Lists(nn.Module):
    """A result that is changed afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        factors = torch.arange(1, 5).tolist()
        factors.pop(0)
        return self.body(x * factors[0])


class Features(nn.Module):
    """The prefix's result is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).tanh()
        return hidden, self.last(self.norm(self.body(hidden)).relu())


def test_calls_that_differ_and_results_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    x, other = torch.randn(7, 6), torch.randn(7, 6)
    y = torch.arange(7) % 3

    def target(net: PlasticNet) -> Tensor:
        """The first call is not trained."""
        with torch.no_grad():
            wanted, _ = net(x)
        hidden, out = net(x)
        return F.cross_entropy(out, y) + (hidden - wanted.roll(1, 1)).square().mean()

    def twice(net: PlasticNet) -> Tensor:
        return F.cross_entropy(net(x)[1], y) + F.cross_entropy(net(other)[1], y)

    def caught(net: PlasticNet) -> Tensor:
        try:
            return F.cross_entropy(net(x), y)
        except Exception:
            return torch.zeros((), requires_grad=True)

    for model, closure in ((Features, target), (Features, twice), (Lists, caught)):
        results = []
        for replays in (Prefix.replays, lambda *_, **__: False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Prefix, "replays", replays)
                torch.manual_seed(0)
                net = PlasticNet(model(), (x,), gates="batch")
                net.k = 3.0
                net.train()
                torch.manual_seed(1)
                net.expected_loss(lambda net=net, closure=closure: closure(net)).backward()
                results.append([*(p.grad for p in net.parameters()), *net.buffers(), torch.get_rng_state()])
        for one, two in zip(*results, strict=True):
            assert (one is None and two is None) or torch.equal(one, two), closure


def test_a_copy_has_a_prefix_too() -> None:
    x, y = torch.randn(4, 1, 28, 28), torch.randint(0, 10, (4,))
    net = PlasticNet(LeNet5(), (x,))
    net.k = 7.0
    net = copy.deepcopy(net).train()
    step(net, x, y)
    with Counts() as counts:
        net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    assert counts.counts["aten.convolution"] == 3
