"""What is interrupted has changed everything or nothing, wherever in the library the interrupt comes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.blocks import InOrder
from tests.kit.heavy import RUNS
from tests.kit.interrupts import interrupted, lines_of
from tests.kit.networks import assert_same


@dataclass
class Case:
    """A network in the middle of a training, and the call that is to be interrupted."""

    net: pn.PlasticNet
    optimizer: torch.optim.Optimizer
    call: Callable[[], object] = lambda: None
    schedule: pn.Schedule | None = None

    def train(self, steps: int = 1) -> None:
        x = torch.randn(6, 4)
        for _ in range(steps):
            loss = self.net.train().expected_loss(lambda: self.net(x).square().mean(1))
            self.optimizer.zero_grad()
            (loss + (0 if self.schedule is None else self.schedule.penalty())).backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Everything that an interrupt could leave between what it was and what it is to be."""
        return copy.deepcopy(
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "random": torch.get_rng_state(),
                "gradients": [p.grad for p in self.net.parameters()],
                "modules": repr(self.net),
                "modes": [m.training for m in self.net.modules()],
                "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.net.modules()],
                "multiple of": self.net.multiple_of,
                "running": self.net.sampler.running.role,
                "measures": self.net.sampler.missed is None,
            }
        )


def norms() -> Case:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    net = pn.PlasticNet(model, (torch.randn(6, 4),))
    net.k = 7.0
    return Case(net, torch.optim.Adam(net.param_groups(0.01)))


def resized(change: Callable[[Case], object]) -> Callable[[], Case]:
    def make() -> Case:
        case = norms()
        case.train()
        with torch.no_grad():
            case.net.sites["0"].phi[:3] = -1.0
        case.call = lambda: change(case)
        return case

    return make


def woken() -> Case:
    net = pn.PlasticNet(InOrder(), (torch.randn(6, 4),), blocks=["layers.?"])
    pn.narrow(net, 2, blocks=1)
    case = Case(net, torch.optim.Adam(net.param_groups(0.01)))
    case.train()
    case.call = lambda: net.grow({n: 1 for n in net.sites if n.endswith("depth")}, case.optimizer)
    return case


def stepped(epochs: int, grows: bool = False, **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        case = norms()
        growth = pn.Growth() if grows else None
        stages = [pn.Stage(3, k=7.0), pn.Stage(1)]
        case.schedule = pn.Schedule(case.net, case.optimizer, stages, growth=growth, **options)
        for epoch in range(epochs):
            case.train(20 if grows else 1)
            if epoch < epochs - 1:
                case.schedule.step(1.0)
        if not grows:
            with torch.no_grad():
                case.net.sites["0"].phi[:3] = -1.0
        case.call = lambda: case.schedule and case.schedule.step(1.0)
        return case

    return make


def gradmax(case: Case) -> None:
    x = torch.ones(6, 4)
    case.net.grow({"0": 2}, case.optimizer, init="gradmax", loss=lambda: case.net(x).square().mean(1))


def loaded(case: Case) -> None:
    """Load the state of a network of other sizes, of which one site is wider and one narrower."""
    other = norms().net
    other.resize({"0": [0, 1, -1], "3": [0, 1, 2, 3, 4, 5, -1]})
    case.call = lambda: case.net.load_state_dict(other.state_dict())


def alike(case: Case) -> None:
    other = norms().net.state_dict()
    case.call = lambda: case.net.load_state_dict(other)


def narrowed(case: Case) -> None:
    case.call = lambda: pn.narrow(case.net, 2)


def pruned(case: Case) -> None:
    case.net.k = math.inf
    case.call = lambda: pn.prune_once(case.net, pn.Budget(units=0.5), case.optimizer)


def repaired(case: Case) -> None:
    case.net.k = math.inf
    x = torch.randn(64, 4).split(16)
    case.call = lambda: pn.repair(case.net.train(), x)


def prepared(change: Callable[[Case], None]) -> Callable[[], Case]:
    def make() -> Case:
        case = resized(lambda _: None)()
        change(case)
        return case

    return make


def asleep() -> Case:
    net = pn.PlasticNet(InOrder(), (torch.randn(6, 4),), blocks=["layers.?"])
    return Case(net, torch.optim.Adam(net.param_groups(0.01)), lambda: pn.narrow(net, 2, blocks=1))


CASES: dict[str, Callable[[], Case]] = {
    "resize": resized(lambda c: c.net.resize({"0": [0, 2, 5, -1], "3": [1, 2]}, c.optimizer)),
    "grow": resized(lambda c: c.net.grow({"0": 2, "3": 1}, c.optimizer, grace=2)),
    "grow, by the gradient": resized(gradmax),
    "grow, whole blocks": woken,
    "prune": resized(lambda c: c.net.prune(0.5, c.optimizer, multiple_of=2)),
    "load, of other sizes": prepared(loaded),
    "load, of the same sizes": prepared(alike),
    "narrow": prepared(narrowed),
    "narrow, whole blocks": asleep,
    "prune once": prepared(pruned),
    "repair": prepared(repaired),
    "compact": resized(lambda c: c.net.compact()),
    "step, which cuts": stepped(1, hibernate=0.3),
    "step, which grows": stepped(1, grows=True, pressure=pn.Pressure(1e-3)),
    "step, which hardens": stepped(3, budget=pn.Budget(units=0.5)),
    "step, which looks at the loss": stepped(2, budget=pn.Budget(loss=0.1)),
}


POINTS = 150 if RUNS else 30  # `make heavy` looks at the most


def made(name: str) -> Case:
    torch.manual_seed(0)
    case = CASES[name]()
    torch.manual_seed(1)
    return case


def check(name: str, points: int) -> None:
    """Interrupt a call at some of its lines, by chance, and look at what that has left.

    What was not changed is used again, because a network takes longer to build than to change.
    """
    case = made(name)
    before = case.state()
    lines = lines_of(case.call)
    after = case.state()
    case, hits = made(name), 0
    for at in random.Random(0).sample(range(lines), points):
        parameters = list(case.net.parameters())
        try:
            with interrupted(at):
                case.call()
        except KeyboardInterrupt:
            hits += 1
        found = case.state()
        if not _equal(before, after) and _equal(found, after):
            case = made(name)
        else:
            assert_same(found, before)
            assert all(p is q for p, q in zip(case.net.parameters(), parameters, strict=True))
    assert hits >= 0.9 * points  # a network that is used again knows some things already, and runs fewer lines


def _equal(a: Any, b: Any) -> bool:
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", CASES)
def test_before_or_after(name: str) -> None:
    check(name, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_before_or_after_at_many_points(name: str) -> None:
    check(name, POINTS)


def test_a_model_that_is_given_to_shrink_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(64, 4).split(16)
    model[1].eval()

    def state() -> dict[str, Any]:
        return {
            "state": copy.deepcopy(model.state_dict()),
            "modes": [m.training for m in model.modules()],
            "gradients": [p.grad for p in model.parameters()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        }

    def call() -> None:
        pn.shrink(model, x, pn.Budget(macs=0.5))

    before, lines = state(), lines_of(call)
    for at in random.Random(0).sample(range(lines), 8):
        with pytest.raises(KeyboardInterrupt), interrupted(at):
            call()
        assert_same(state(), before)


def test_a_pass_gives_the_parameters_back_whichever_line_of_that_is_interrupted() -> None:
    case, x = norms(), torch.randn(6, 4)

    def call() -> None:
        case.net.train().expected_loss(lambda: case.net(x).square().mean(1)).backward()

    call()
    parameters, lines = list(case.net.parameters()), lines_of(call, "tools/lending.py")
    assert lines
    for at in range(lines):
        with pytest.raises(KeyboardInterrupt), interrupted(at, "tools/lending.py"):
            call()
        assert all(p is q for p, q in zip(case.net.parameters(), parameters, strict=True))
        assert all(isinstance(m.weight, nn.Parameter) for m in case.net.modules() if isinstance(m, nn.Linear))
        call()


def test_an_interrupted_step_is_taken_again_as_if_nothing_had_happened() -> None:
    states = []
    for at in (None, 2000, 4000):
        case = made("step, which hardens")
        if at is not None:
            with pytest.raises(KeyboardInterrupt), interrupted(at):
                case.call()
        case.call()
        case.train()
        states.append(case.state())
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_memory_that_runs_out_while_the_state_of_an_optimizer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    case = made("resize")
    before, contiguous, calls = case.state(), Tensor.contiguous, [0]

    def scarce(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 12:
            raise torch.OutOfMemoryError("no memory is left")
        return contiguous(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "contiguous", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        case.call()
    monkeypatch.undo()
    assert_same(case.state(), before)
    case.call()
    case.train()


@pytest.mark.parametrize(("k", "first"), [(3.0, 1), (3.0, 2), (math.inf, 1)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_closure_that_is_interrupted(k: float, error: type[BaseException], first: int) -> None:
    case = norms()
    case.net.k = k
    case.train()
    case.net.sampler.samples_apart = None  # so that the first call asks whether gates may be drawn per sample
    x, calls = torch.randn(6, 4), [0]
    before = case.state()

    def closure() -> Tensor:
        found = case.net(x).square().mean(1)
        calls[0] += 1
        if calls[0] >= first:
            raise error
        return found

    with pytest.raises(error):
        case.net.expected_loss(closure)
    assert calls[0] == first
    assert_same(case.state(), before)
    case.train()
