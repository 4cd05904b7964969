"""Going on from a checkpoint, bit for bit; states that do not fit change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import plasticnet as pn
from plasticnet import Growth, PlasticError, PlasticNet, Pressure, Schedule, Stage
from tests.kit.networks import ConvNet, assert_same, images, mlp, set_probabilities, small

INF = math.inf
OPTIMIZERS: dict[str, Callable[[Iterable], Optimizer]] = {
    "adam": Adam,
    "sgd": lambda groups: SGD(groups, momentum=0.9),
    "adamw": AdamW,
}
STAGES = [Stage(2), Stage(6, 7.0), Stage(2)]


class Run:
    """A training run of one kind, that can be stopped and loaded."""

    def __init__(self, model: str, mode: str, optimizer: str) -> None:
        torch.manual_seed(0)
        self.mode, self.optimizer_name = mode, optimizer
        make, self.x = (mlp, torch.randn(24, 8)) if model == "mlp" else (ConvNet, images(24))
        self.y = (self.x.flatten(1)[:, 0] > 0).long()
        module = make(8, 10, 6, 3) if make is mlp else ConvNet(dropout=0.2)
        self.net = PlasticNet(module, (self.x[:2],), inputs=("0",) if make is mlp else ("fc1",))
        if mode == "grow":
            pn.narrow(self.net, 2)
        self.build()

        self.strength = 0.02 if mode == "prune" and optimizer != "sgd" else 0.1  # some close, and not all

    def build(self) -> None:
        rates = (
            (0.1, 0.5 if self.mode == "grow" else 0.3)
            if self.optimizer_name == "sgd"
            else (1e-2, 0.2 if self.mode == "grow" else 0.08)
        )
        self.optimizer = OPTIMIZERS[self.optimizer_name](self.net.param_groups(*rates))
        options = {"growth": Growth(), "pressure": Pressure(1e-4)} if self.mode == "grow" else {}
        self.schedule = Schedule(self.net, self.optimizer, STAGES, hibernate=0.3, **options)

    def epoch(self) -> tuple[float, pn.schedule.Change]:
        total = 0.0
        grows = self.mode == "grow"  # It judges after 32 steps.
        for index in torch.randint(len(self.x), (33, 8)) if grows else torch.randperm(len(self.x)).split(8):
            x, y = self.x[index], self.y[index]
            self.net.train()
            loss = self.net.expected_loss(lambda x=x, y=y: F.cross_entropy(self.net(x), y, reduction="none"))
            self.optimizer.zero_grad()
            (loss + (self.schedule.penalty() if grows else self.net.penalty(self.strength))).backward()
            self.optimizer.step()
            total += loss.item()
        val_loss = {"grow": 1 / (1 + self.schedule.epoch) if self.schedule.epoch < 4 else 1.0}.get(self.mode)
        return total, self.schedule.step(val_loss)

    def state(self) -> dict[str, Any]:
        parts = {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}
        return {**{n: p.state_dict() for n, p in parts.items()}, "rng": torch.get_rng_state()}

    def load(self, state: dict[str, Any], net: bool = True) -> None:
        if net:
            self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mode", "optimizer"),
    [("mlp", mode, optimizer) for mode in ("prune", "grow") for optimizer in OPTIMIZERS]
    + [("conv", "prune", "sgd"), ("conv", "grow", "adam")],
)
def test_going_on_equals_never_stopping(model: str, mode: str, optimizer: str, tmp_path: Path) -> None:
    whole = Run(model, mode, optimizer)
    sizes, expected = [{n: len(s) for n, s in whole.net.sites.items()}], []
    stops = (2, 5, 8)  # on entering the plastic stage, within it, after hardening
    for epoch in range(10):
        expected.append(whole.epoch())
        sizes.append({n: len(s) for n, s in whole.net.sites.items()})
        if epoch + 1 in stops:
            pn.save_checkpoint(whole.state(), tmp_path / str(epoch + 1))
    assert sizes[5] != sizes[0]  # or the test would say little
    assert sizes[8] != sizes[5]
    for stop in stops:
        for rebuilt in (False, True):
            saved = pn.load_checkpoint(tmp_path / str(stop))  # anew: optimizers take its tensors as their own
            run = Run(model, mode, optimizer)
            if rebuilt:  # the optimizer is built on the loaded network
                run.net.load_state_dict(saved["net"])
                run.build()
            run.load(saved)
            seen = [run.epoch() for _ in range(10 - stop)]
            assert seen == expected[stop:]
            assert_same(run.state(), whole.state(), f"{stop}")


def test_a_schedule_built_on_a_loaded_network_leaves_it_alone() -> None:
    run = Run("mlp", "prune", "adam")
    for _ in range(3):
        run.epoch()
    with torch.no_grad():
        run.net.sites["2"].phi[:2] = torch.tensor([-0.05, 0.4])  # the first one is closed, not yet hibernating
    state = copy.deepcopy(run.state())
    again = Run("mlp", "prune", "adam")
    again.net.load_state_dict(state["net"])
    again.build()
    again.load(state, net=False)
    assert_same(again.state(), state)


@pytest.mark.parametrize("growth", [False, True])
def test_a_schedule_that_starts_plastic_leaves_a_hardened_network_alone(growth: bool) -> None:
    def build(net: PlasticNet) -> tuple[Optimizer, Schedule]:
        optimizer = Adam(net.param_groups(1e-2))
        return optimizer, Schedule(net, optimizer, [Stage(1, 7.0), Stage(2)], growth=Growth.paper() if growth else None)

    net, _ = small()
    _, schedule = build(net)
    set_probabilities(net, "0", 0.9, 0.8, 0.7, 0.6, 0.9, 0.9)
    schedule.step(1.0)
    state, schedule_state = copy.deepcopy(net.state_dict()), schedule.state_dict()
    again, _ = small()
    again.load_state_dict(state)
    _, schedule = build(again)
    schedule.load_state_dict(schedule_state)
    assert_same(again.state_dict(), state)


def test_a_trained_optimizer_takes_another_size() -> None:
    """Loading into objects that have been in use, and have other sizes."""
    run, other = Run("conv", "prune", "adam"), Run("conv", "prune", "adam")
    for _ in range(9):
        other.epoch()
    torch.manual_seed(1)
    for _ in range(4):
        run.epoch()
    state = copy.deepcopy(run.state())
    expected = [run.epoch() for _ in range(3)]
    other.load(state)
    assert [other.epoch() for _ in range(3)] == expected
    assert_same(other.state(), run.state())


def others() -> list[Any]:
    return [
        pytest.param(mlp(4, 6, 5, 5, 3), torch.randn(2, 4), (), id="other sites"),
        pytest.param(mlp(7, 6, 5, 3), torch.randn(2, 7), (), id="another input"),
        pytest.param(mlp(4, 6, 5, 2), torch.randn(2, 4), (), id="another output"),
        pytest.param(mlp(4, 6, 5, 3), torch.randn(2, 4), ("0",), id="input sites"),
        pytest.param(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 3)),
            torch.randn(2, 4), (), id="tensors too many",
        ),
        pytest.param(
            nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
            torch.randn(2, 4), (), id="tensors too few",
        ),
    ]  # fmt: skip


def assert_refused_and_unchanged(net: PlasticNet, state: dict[str, Any]) -> None:
    before = copy.deepcopy(net.state_dict())
    parameters = list(net.parameters())
    widths = repr(net.model)
    with pytest.raises(PlasticError, match=r"model\.|gates|another architecture|features|site|k="):
        net.load_state_dict(state)
    assert_same(net.state_dict(), before)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert repr(net.model) == widths


@pytest.mark.parametrize(("model", "x", "inputs"), others())
def test_state_of_another_architecture_changes_nothing(model: nn.Module, x: Tensor, inputs: tuple[str, ...]) -> None:
    net, _ = small()
    other = PlasticNet(model, (x,), inputs=inputs)
    other.resize({"0": [0, 2]})  # and of another size
    assert_refused_and_unchanged(net, other.state_dict())
    assert_refused_and_unchanged(other, net.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"0.phi": None},
        {"0.phi": torch.zeros(0)},
        {"0.phi": torch.zeros(2, 2)},
        {"0.grace": torch.zeros(9)},
        {"0/input.phi": torch.zeros(3)},
        {"0/input.features": torch.tensor([3, 1, 2, 0])},
        {"0/input.features": torch.tensor([0, 1, 2, 4])},
        {"0/input.features": torch.tensor([0.0, 1, 2, 3])},
        {"0/input.features": None},
        {"model.0.weight": torch.zeros(6, 9)},
        {"model.0.weight": None},
        {"_extra_state": torch.tensor(-1.0)},
        {"_extra_state": None},
        {"_extra_state": torch.ones(2)},
    ],
)
def test_damaged_state_changes_nothing(changes: dict[str, Tensor | None]) -> None:
    net, _ = small(inputs=("0",))
    state = copy.deepcopy(net.state_dict())
    net.resize({"2": [0, 1]})
    net.load_state_dict(state)
    net.resize({"2": [0, 1]})
    for ending, value in changes.items():
        (name,) = [n for n in state if n.endswith(ending)]
        state[name] = value
    assert_refused_and_unchanged(net, {n: t for n, t in state.items() if t is not None})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_extra_state", np.array(5.0), r"_extra_state \(k\): the state has a ndarray here.*torch\.from_numpy"),
        ("_extra_state", 5.0, r"_extra_state \(k\): the state has a float here, and the network a tensor$"),
        ("_extra_state", torch.tensor(5.0, device="meta"), r"_extra_state \(k\): .* on the meta device"),
        ("model.0.weight", np.zeros((6, 4), np.float32), r"model\.0\.weight: the state has a ndarray .*from_numpy"),
        ("model.0.weight", [1.0], r"model\.0\.weight: the state has a list here, and the network a tensor$"),
    ],
)
def test_what_is_no_tensor_with_values_is_named_by_its_type(name: str, value: Any, message: str) -> None:
    net, _ = small()
    with pytest.raises(PlasticError, match=message):
        net.load_state_dict({**net.state_dict(), name: value})


@pytest.mark.parametrize(
    ("lost", "added", "message"),
    [
        (["model.0.bias"], [], r"it lacks \['model\.0\.bias'\]$"),
        ([], ["model.9.bias"], r"it also has \['model\.9\.bias'\]$"),
        (["model.0.bias"], ["model.9.bias"], r"it lacks \['model\.0\.bias'\] and also has \['model\.9\.bias'\]$"),
    ],
)
def test_only_the_keys_that_differ_are_named(lost: list[str], added: list[str], message: str) -> None:
    net, _ = small()
    state = {name: t for name, t in net.state_dict().items() if name not in lost}
    with pytest.raises(PlasticError, match=message):
        net.load_state_dict({**state, **dict.fromkeys(added, torch.zeros(1))})


def test_a_state_whose_features_lie_elsewhere() -> None:
    def make() -> PlasticNet:
        return PlasticNet(ConvNet(), (images(),), inputs=("fc1",))

    net, fresh, x = make(), make(), images()
    net.resize({"conv3": [0], "fc1.input": [0, 5, 24]})
    fresh.resize({"fc1.input": [37, 39]})  # both of a channel that `net` does not have
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(x), net.eval()(x))


@pytest.mark.parametrize("k", [7.0, float("inf")])
def test_a_state_of_another_size_while_an_old_loss_is_still_there(k: float) -> None:
    """Its graph remembers the shapes that were."""
    net = PlasticNet(mlp(4, 8, 6, 3), (torch.randn(2, 4),), weights=("2",))
    small = PlasticNet(mlp(4, 8, 6, 3), (torch.randn(2, 4),), weights=("2",))
    small.resize({"0": [0, 3], "2": [1, 2, 5]})
    x, kept = torch.randn(5, 4), []
    optimizer = torch.optim.Adam(net.param_groups(1e-2))
    for state in (small.state_dict(), PlasticNet(mlp(4, 8, 6, 3), (x,), weights=("2",)).state_dict()):
        net.k = k
        kept.append(net.train().expected_loss(lambda: net(x).square().sum(1)) + net.penalty(0.1))
        kept[-1].backward()
        before = list(net.parameters())
        net.load_state_dict(state)
        assert all(p is q for p, q in zip(net.parameters(), before, strict=True))
        net.k = k
        kept.append(net.train().expected_loss(lambda: net(x).square().sum(1)) + net.penalty(0.1))
        kept[-1].backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in net.model.parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
