"""What is done within `torch.inference_mode`, as validation code does it, leaves a network that can be trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticNet, Schedule, Stage

X, Y = torch.randn(32, 6), torch.randint(0, 3, (32,))
FORCES: dict[str, Callable[[], dict[str, Any]]] = {
    "budget of parameters": lambda: {"budget": pn.Budget(params=0.3)},
    "budget of loss": lambda: {"budget": pn.Budget(loss=0.5)},
    "pressure": lambda: {"pressure": pn.Pressure(0.1)},
    "growth": lambda: {"growth": pn.Growth(), "pressure": pn.Pressure(1e-4, cost="parameters")},
    "growth to a budget": lambda: {"growth": pn.Growth(), "budget": pn.Budget(params=0.9)},
}


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def _net() -> PlasticNet:
    return PlasticNet(_model(), (X[:2],))


def _losses(net: PlasticNet) -> Tensor:
    return F.cross_entropy(net(X), Y, reduction="none")


def _runs_on(module: nn.Module) -> bool:
    """Return whether a module can be trained for a step, and nothing that it holds was made in inference mode."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for k in (7.0, float("inf")) if isinstance(module, PlasticNet) else (None,):
        module.train()
        if isinstance(module, PlasticNet) and k is not None:
            module.k = k
            module.expected_loss(lambda net=module: _losses(net)).backward()
        else:
            F.cross_entropy(module(X), Y).backward()
        optimizer.step()
    return not any(t.is_inference() for t in (*module.parameters(), *module.buffers()))


def _trained(force: dict[str, Any], inside: bool) -> tuple[list[Any], dict[str, Tensor]]:
    """Return what the steps of a schedule did, in inference mode or not, and the state of the network afterwards."""
    net = _net()
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(net.param_groups(lr=0.02))
    schedule = Schedule(net, optimizer, [Stage(1), Stage(4, k=7.0), Stage(2)], **force)
    changes: list[Any] = []
    for epoch in range(schedule.epochs):
        for _ in range(34 if "growth" in force else 4):
            net.train()
            optimizer.zero_grad()
            (net.expected_loss(lambda: _losses(net)) + schedule.penalty()).backward()
            optimizer.step()
        if epoch == 1:
            net.sites["0"].phi.data[:5] = -1.0
        net.eval()
        with torch.inference_mode() if inside else nullcontext():
            with torch.no_grad():
                loss = _losses(net).mean().item()
            changes.append(schedule.step(loss))
    return changes, net.state_dict()


@pytest.mark.parametrize("kind", FORCES)
def test_steps_of_a_schedule_in_inference_mode_are_those_outside_of_it(kind: str) -> None:
    changes, state = _trained(FORCES[kind](), inside=True)
    others, expected = _trained(FORCES[kind](), inside=False)
    assert changes == others
    assert any(change.cut or change.grown for change in changes)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_schedule_that_is_made_and_waked_in_inference_mode_runs_on() -> None:
    net = _net()
    optimizer = torch.optim.Adam(net.param_groups(lr=0.02))
    with torch.inference_mode():
        schedule = Schedule(net, optimizer, [Stage(2, k=7.0), Stage(1)], budget=pn.Budget(params=0.5))
        state = schedule.state_dict()
        schedule.load_state_dict(state)
    for _ in range(2):
        for _ in range(3):
            (net.train().expected_loss(lambda: _losses(net)) + schedule.penalty()).backward()
            optimizer.step()
            with torch.inference_mode():
                schedule.step()
        with torch.inference_mode():
            schedule.wake()
    assert _runs_on(net)


def _closed(net: PlasticNet) -> PlasticNet:
    net.sites["0"].phi.data[:3] = -1.0
    return net


CHANGES: dict[str, Callable[[PlasticNet], object]] = {
    "resize": lambda net: net.resize({"0": [0, 1, -1]}),
    "grow": lambda net: net.grow({"0": 2}),
    "grow by the gradient": lambda net: net.grow({"0": 2}, init="gradmax", loss=lambda: _losses(net)),
    "prune": lambda net: _closed(net).prune(),
    "scores": lambda net: pn.scores(net, "taylor", lambda: _losses(net)),
    "prune_once": lambda net: pn.prune_once(net, pn.Budget(macs=0.5)),
    "sensitivity": lambda net: pn.sensitivity(net, lambda net: _losses(net).mean()),
    "repair": lambda net: pn.repair(_closed(net), X.split(16)),
    "narrow": lambda net: pn.narrow(net, 2),
    "measure_latency": lambda net: net.measure_latency((X,), networks=8, repeats=1),
    "another precision": lambda net: net.double().float(),
    "evaluation": lambda net: _closed(net).eval()(X),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_was_changed_in_inference_mode_can_be_trained(change: str) -> None:
    net = _net()
    with torch.inference_mode():
        CHANGES[change](net)
    assert _runs_on(net)


@pytest.mark.parametrize("within", [False, True], ids=["itself", "within a module"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("made_there", [False, True])
def test_a_state_dict_that_is_loaded_in_inference_mode_can_be_trained(
    within: bool, assign: bool, made_there: bool
) -> None:
    net, other = _net(), _net()
    other.resize({"0": [0, 1, 2]})
    held, source = (nn.Sequential(net), nn.Sequential(other)) if within else (net, other)
    with torch.inference_mode():
        state = {name: t.clone() if made_there else t for name, t in source.state_dict().items()}
        held.load_state_dict(state, assign=assign)
    assert all(torch.equal(t, state[name]) for name, t in held.state_dict().items())
    assert _runs_on(net)


def test_what_is_made_in_inference_mode_can_be_trained(tmp_path: Any) -> None:
    model, net = _model(), _closed(_net())
    pn.save(net.compact(), tmp_path / "small.safetensors")
    factory = _model()
    with torch.inference_mode():
        x = torch.randn(2, 6)
        made = [
            PlasticNet(model, (x,)), copy.deepcopy(net), net.compact(),
            pn.load(tmp_path / "small.safetensors", lambda: factory),
        ]  # fmt: skip
    assert all(map(_runs_on, made))


def test_no_grad_stays_on_while_sizes_change() -> None:
    net = _net()
    with torch.no_grad():
        net.resize({"0": [0, 1, -1]})
        assert not torch.is_grad_enabled()
    assert _runs_on(net)


def test_a_change_that_fails_in_inference_mode_changes_nothing() -> None:
    net = _net()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with torch.inference_mode(), pytest.raises(pn.PlasticError, match="0 to 15"):
        net.resize({"0": [0, 99]})
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert _runs_on(net)
