"""A step of the schedule that fails changes nothing, and can be tried again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticError
from tests.kit.networks import assert_same


class Norms(nn.Module):
    """Attention, a norm over the batch, and a norm over the units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 4, batch_first=True)
        self.first, self.batch, self.out = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.out(self.batch(self.first(h.mean(1))).relu())


class Run:
    """A schedule that cuts, closes and repairs in the same step, with inputs that can be made to fail."""

    def __init__(self, budget: pn.Budget | None) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(6, 3, 4)
        self.net = pn.PlasticNet(Norms(), (self.x,))
        self.optimizer = torch.optim.Adam(self.net.param_groups(0.01))
        self.fault: Callable[[Tensor], Any] = lambda value: value
        self.reads, self.first = 0, 1
        stages = [pn.Stage(2, k=7.0), pn.Stage(3)]
        self.schedule = pn.Schedule(
            self.net, self.optimizer, stages, hibernate=0.2, budget=budget, repair=self, on_resize=self.told
        )
        self.resizes = 0

    def __iter__(self) -> Iterator[Any]:
        for part in torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(1)).split(8):
            self.reads += 1
            yield self.fault(part) if self.reads >= self.first else part

    def told(self, _: pn.PlasticNet) -> None:
        self.resizes += 1

    def train(self) -> None:
        self.net.train()
        loss = self.net.expected_loss(lambda: self.net(self.x).square().mean(1)) + self.schedule.penalty()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.schedule.stage.plastic:
            with torch.no_grad():
                self.net.sites["first"].phi[:4] = -1.0  # these are cut at the end of the epoch

    def state(self) -> dict[str, Any]:
        return {
            "net": copy.deepcopy(self.net.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "schedule": copy.deepcopy(self.schedule.state_dict()),
            "random": torch.get_rng_state(),
            "gradients": [p.grad if p.grad is None else p.grad.clone() for p in self.net.parameters()],
        }


def raises(_: Tensor) -> Tensor:
    raise OSError("the disk is full")


FAULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "NaN": (lambda value: value * math.nan, PlasticError),
    "another shape": (lambda value: value[..., :3], PlasticError),
    "another error": (raises, OSError),
}


def begun(budget: pn.Budget | None) -> Run:
    run = Run(budget)
    run.train()
    run.schedule.step()  # cuts, and fills the state of the optimizer
    run.train()
    return run


def finished(run: Run) -> tuple[list[Any], dict[str, Any]]:
    changes = []
    for _ in range(3):
        changes.append(run.schedule.step())
        run.train()
    return changes, run.state()


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_inputs_of_the_repair_that_fail_change_nothing(name: str, first: int) -> None:
    budget = pn.Budget(macs=0.5)
    changes, state = finished(begun(budget))
    assert changes[0].cut
    run = begun(budget)
    before, parameters, model, told = run.state(), list(run.net.parameters()), repr(run.net), run.resizes
    run.fault, error = FAULTS[name]
    run.first = run.reads + first
    with pytest.raises(error):
        run.schedule.step()
    assert_same(run.state(), before)
    assert all(p is q for p, q in zip(run.net.parameters(), parameters, strict=True))
    assert repr(run.net) == model
    assert run.resizes == told
    run.fault = lambda value: value
    again = finished(run)
    assert again[0] == changes
    assert_same(again[1], state)


def test_candidates_of_a_loss_that_fails_leave_nothing() -> None:
    run = Run(None)
    run.train()
    calls: list[int] = []

    def loss(fault: Callable[[Tensor], Tensor], first: int) -> Tensor:
        calls.append(1)
        value = run.net(run.x).square().mean(1)
        return fault(value) if len(calls) >= first else value

    before = copy.deepcopy(run.net.state_dict())
    for fault, first in ((lambda value: (value * 0).sqrt(), 1), (lambda value: value * math.nan, 2)):
        calls.clear()
        with pytest.raises(PlasticError, match="NaN or infinite"):
            run.net.grow({"first": 2}, run.optimizer, init="gradmax", loss=partial(loss, fault, first))
        assert_same(copy.deepcopy(run.net.state_dict()), before)


def broken() -> dict[str, Any]:
    return {
        "good": {"0": "x"},
        "level": ["x"],
        "sizes": [1.0, math.nan],
        "base": [None],
        "targets": {"macs": "x"},
        "widths": {"first": 2.5},
    }


@pytest.mark.parametrize("key", broken())
def test_a_damaged_state_of_the_budget_changes_nothing(key: str) -> None:
    run = Run(pn.Budget(macs=0.3))
    run.train()
    run.schedule.step(1.0)
    state, before = copy.deepcopy(run.schedule.state_dict()), run.state()
    bad = copy.deepcopy(state)
    value = broken()[key]
    bad["budget"][key] = {**bad["budget"][key], **value} if isinstance(value, dict) else value
    with pytest.raises(PlasticError, match="budget"):
        run.schedule.load_state_dict(bad)
    assert_same(run.state(), before)
    run.schedule.load_state_dict(state)


@pytest.mark.parametrize("value", [None, torch.ones(2, dtype=torch.int64), torch.full((12,), math.nan), [0.0]])
def test_damaged_logits_to_return_to_change_nothing(value: Any) -> None:
    run = Run(pn.Budget(loss=0.5))
    run.train()
    run.schedule.step(1.0)
    bad, before = copy.deepcopy(run.schedule.state_dict()), run.state()
    bad["budget"]["good"] = {"first": value}
    with pytest.raises(PlasticError, match="budget"):
        run.schedule.load_state_dict(bad)
    assert_same(run.state(), before)


@pytest.mark.parametrize("rounds", [[], [1], [0, 0], [0, 9], ["x"], None])
def test_damaged_rounds(rounds: Any) -> None:
    run = Run(None)
    bad = {**run.schedule.state_dict(), "rounds": rounds}
    with pytest.raises(PlasticError, match="rounds"):
        run.schedule.load_state_dict(bad)
    with pytest.raises(PlasticError, match="mapping"):
        run.schedule.load_state_dict(None)  # pyright: ignore[reportArgumentType]


def test_a_latency_of_another_network_changes_nothing() -> None:
    run = Run(None)
    term = pn.Term("fc", "fc.weight", dims=(0,), lengths=(10,), milliseconds=4.0)
    latency = pn.Latency((term,), (), 4.0, 0.0, 0.0, 8, 2, "cpu", "torch.float32", 1)
    before = run.state()
    with pytest.raises(PlasticError, match=r"fc\.weight"):
        run.schedule.load_state_dict({**run.schedule.state_dict(), "latency": latency.as_dict()})
    assert_same(run.state(), before)
    assert run.net.latency is None
