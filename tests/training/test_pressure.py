"""A pressure: the penalty that a schedule adds, its scale, what it refuses, and how it is resumed."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam

from plasticnet import (
    Budget,
    Growth,
    PlasticError,
    PlasticNet,
    Pressure,
    Schedule,
    Stage,
    load_checkpoint,
    narrow,
    save_checkpoint,
)
from plasticnet.cost.latency import Latency, Term
from tests.kit.networks import assert_same, mlp, set_probabilities

STAGES = (Stage(1), Stage(4, 7.0), Stage(1))


def build(pressure: Any = None, stages: Any = STAGES, **options: Any) -> tuple[PlasticNet, Adam, Schedule]:
    torch.manual_seed(0)
    net = PlasticNet(mlp(8, 40, 24, 4), (torch.randn(2, 8),))
    optimizer = Adam(net.param_groups(5e-3, 0.05))
    return net, optimizer, Schedule(net, optimizer, stages, pressure=pressure, **options)


def known_latency(net: PlasticNet, milliseconds: float = 1.0) -> None:
    """Let the latency follow the second layer, by a number instead of a measurement."""
    terms = (Term("2.weight", "2.weight", (0, 1), (24, 40), milliseconds),)
    net.use_latency(Latency(terms, (), milliseconds, 0, 0, 9, 3, "cpu", "float32", 1))


def epoch(net: PlasticNet, optimizer: Adam, schedule: Schedule, steps: int = 4) -> float:
    """One epoch; returns the loss of all samples."""
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    net.train()
    for i in torch.arange(64).chunk(steps):
        loss = net.expected_loss(lambda i=i: F.cross_entropy(net(x[i]), y[i], reduction="none"))
        optimizer.zero_grad()
        (loss + schedule.penalty()).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(net.eval()(x), y).item()


def pressed(net: PlasticNet, value: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A penalty and its gradients with respect to the logits."""
    return value.detach(), list(torch.autograd.grad(value, [g.phi for g in net.all_gates()]))


# -- what it adds -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("cost", ["units", "parameters", "macs", "latency", {"macs": 1.0, "parameters": 0.3}])
def test_it_is_the_penalty_of_the_network_in_plastic_epochs(cost: Any, scale: Any) -> None:
    net, _, _ = build()
    known_latency(net)
    schedule = Schedule(net, Adam(net.param_groups(1e-2)), STAGES, pressure=Pressure(0.7, cost, scale))
    schedule.step()
    set_probabilities(net, "2", *torch.rand(24).clamp(0.1, 0.9).tolist())
    net.limit("0", strength=0.5)
    net.sites["2"].grace[:5] = 2  # held open, and unpriced
    found, expected = pressed(net, schedule.penalty()), pressed(net, net.penalty(0.7, cost, scale))
    assert_same(found, expected)
    assert not found[1][1][:5].any()
    assert found[1][1][5:].all()


def test_it_is_zero_outside_of_plastic_stages() -> None:
    _, _, schedule = build(Pressure(0.7), [Stage(1, 0), Stage(1), Stage(1, 7.0), Stage(1)])
    found = []
    for _ in range(4):
        found.append(schedule.penalty().item())
        schedule.step()
    assert [value > 0 for value in found] == [False, False, True, False]
    assert schedule.penalty().item() == 0


def test_it_closes_gates_and_none_does_not() -> None:
    sizes = []
    for pressure in (None, Pressure(0.0), Pressure(3.0, scale="log")):
        net, optimizer, schedule = build(pressure, [Stage(6, 7.0), Stage(1)])
        while schedule.epoch < schedule.epochs:
            epoch(net, optimizer, schedule)
            schedule.step()
        sizes.append(net.summary().parameters)
    assert sizes[0] == sizes[1] > 1.2 * sizes[2]


def test_calls_are_counted() -> None:
    _, _, schedule = build(Pressure(0.7))
    for calls in (3, 2):
        for _ in range(calls):
            schedule.penalty()
        assert schedule.force.steps == calls
        schedule.step()
        assert (schedule.force.steps, schedule.force.per_epoch) == (0, calls)


def test_the_rule_of_the_paper_is_not_waited_for() -> None:
    growth = Growth.paper()
    net, _, schedule = build(Pressure(0.7), [Stage(9, 7.0), Stage(1)], growth=growth)
    schedule.step(1.0)
    assert not growth.stopped
    assert_same(pressed(net, schedule.penalty()), pressed(net, net.penalty(0.7, "parameters")))


# -- relative_to ------------------------------------------------------------------------------


def test_relative_to_a_network_the_strength_is_what_the_whole_is_worth() -> None:
    net, _, _ = build()
    full = net.summary().parameters
    for pressure in (Pressure(0.7, relative_to=net), Pressure(0.7, relative_to=full)):
        assert pressure.prices == {"parameters": 0.7 / full}
        assert pressure.relative_to == full
    narrow(net, 3)
    both = Pressure(0.7, {"macs": 2.0, "units": 1.0, "parameters": 0.0}, relative_to=net)
    now = net.summary()
    assert both.prices == pytest.approx({"macs": 1.4 / now.macs, "units": 0.7 / 6})
    assert replace(both, strength=1.4).prices == pytest.approx({"macs": 2.8 / now.macs, "units": 1.4 / 6})


def test_a_network_that_starts_small_is_priced_by_the_wide_one() -> None:
    net, _, _ = build()
    full = net.summary().parameters
    pressure = Pressure(0.7, relative_to=net)
    narrow(net, 3)
    schedule = Schedule(net, Adam(net.param_groups(1e-2)), [Stage(2, 7.0), Stage(1)], pressure=pressure)
    assert_same(pressed(net, schedule.penalty()), pressed(net, net.penalty(0.7 / full, "parameters")))


def test_a_pressure_keeps_no_network_alive_and_no_mapping() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),))
    costs = {"macs": 1.0}
    pressure = Pressure(0.7, costs, relative_to=net)
    before = pressure.prices
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    costs["macs"] = 9.0
    assert pressure.prices == before
    assert copy.deepcopy(pressure) == pressure


# -- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strength": -1.0}, "0 or more"),
        ({"strength": math.nan}, "0 or more"),
        ({"strength": math.inf}, "0 or more"),
        ({"strength": True}, "0 or more"),
        ({"strength": "1"}, "0 or more"),
        ({"cost": "flops"}, "units, parameters, macs, latency"),
        ({"cost": None}, "units, parameters, macs, latency"),
        ({"cost": {}}, "a weight above 0"),
        ({"cost": {"macs": -1.0}}, "0 or more"),
        ({"scale": "square"}, "linear, log"),
        ({"relative_to": 0}, "a number above 0"),
        ({"relative_to": math.nan}, "a number above 0"),
        ({"relative_to": True}, "a number above 0"),
        ({"relative_to": mlp(4, 3)}, "a PlasticNet"),
        ({"relative_to": {"macs": 5.0}}, "parameters"),
        ({"cost": {"macs": 1.0, "units": 1.0}, "relative_to": 100.0}, "one number for the costs macs, units"),
        ({"scale": "log", "relative_to": 100.0}, "scale='linear'"),
    ],
)
def test_bad_pressures(options: dict[str, Any], named: str) -> None:
    with pytest.raises(PlasticError, match=r"^Pressure.*" + named):
        Pressure(**{"strength": 1.0, **options})


def test_a_latency_that_was_not_measured_is_refused_at_once() -> None:
    net, optimizer, _ = build(stages=[Stage(2)])
    with pytest.raises(PlasticError, match=r"^Pressure: .*measure_latency"):
        Pressure(0.7, "latency", relative_to=net)
    with pytest.raises(PlasticError, match="measure_latency"):
        Schedule(net, optimizer, [Stage(2, 7.0)], pressure=Pressure(0.7, "latency"), multiple_of=4)
    assert math.isinf(net.k)
    assert net.multiple_of == 1


@pytest.mark.parametrize("stages", [[Stage(3)], [Stage(2, k=0.0), Stage(2)]])
def test_without_a_plastic_stage_there_is_no_growth(stages: list[Stage]) -> None:
    with pytest.raises(PlasticError, match=r"grows nothing without a plastic stage.*pn\.Stage\(20, k=7\.0\)"):
        build(Pressure(1e-5, "macs"), stages, growth=Growth())
    build(Pressure(1e-5, "macs"), stages)  # a price alone is taken, as a training at fixed widths has it


def test_a_pressure_and_a_budget_are_one_too_many() -> None:
    with pytest.raises(PlasticError, match=r"budget=\.\.\., pressure=\.\.\..* Leave out"):
        build(Pressure(0.7), budget=Budget(macs=0.5))
    with pytest.raises(PlasticError, match=r"write pn\.Pressure"):
        build(0.7)


# -- state, rounds ----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 4])
def test_resume_equals_the_uninterrupted(stop: int, tmp_path: Path) -> None:
    """Also where the latency was measured to be another in the meantime."""

    def built(milliseconds: float) -> tuple[PlasticNet, Adam, Schedule]:
        torch.manual_seed(0)
        net = PlasticNet(mlp(8, 40, 24, 4), (torch.randn(2, 8),))
        known_latency(net, milliseconds)
        pressure = Pressure(3.0, {"latency": 1.0, "parameters": 1.0}, relative_to=net)
        narrow(net, 12)
        optimizer = Adam(net.param_groups(5e-3, 0.05))
        return net, optimizer, Schedule(net, optimizer, STAGES, growth=Growth(), pressure=pressure)

    def run(net: PlasticNet, optimizer: Adam, schedule: Schedule, until: int) -> None:
        while schedule.epoch < until:
            epoch(net, optimizer, schedule, steps=32)
            schedule.step()

    net, optimizer, schedule = built(1.0)
    run(net, optimizer, schedule, stop)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint({**state, "rng": torch.get_rng_state()}, tmp_path / "run")
    run(net, optimizer, schedule, 6)
    schedule.wake()
    run(net, optimizer, schedule, schedule.epochs)
    again, optimizer, resumed = built(2.5)
    saved = load_checkpoint(tmp_path / "run")
    again.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["rng"])
    run(again, optimizer, resumed, 6)
    resumed.wake()
    run(again, optimizer, resumed, resumed.epochs)
    assert_same(again.state_dict(), net.state_dict())
    assert_same(resumed.state_dict(), schedule.state_dict())


def test_states_of_others_are_refused_by_name() -> None:
    states = {
        "a pressure": build(Pressure(0.7)),
        "a budget": build(budget=Budget(macs=0.5)),
        "none of these": build(),
        "growth and a pressure": build(Pressure(0.7), growth=Growth()),
    }
    for own, (_, _, schedule) in states.items():
        for other, (_, _, source) in states.items():
            if own == other:
                schedule.load_state_dict(source.state_dict())
                continue
            before = schedule.state_dict()
            with pytest.raises(PlasticError, match=f"with {other}, and this one has {own}"):
                schedule.load_state_dict(source.state_dict())
            assert_same(schedule.state_dict(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prices": {"macs": 0.7}},
        {"prices": {"parameters": -0.7}},
        {"prices": {"parameters": math.inf}},
        {"prices": None},
        {"scale": "log"},
        {"steps": 1.5},
        {"per_epoch": -1},
    ],
)
def test_a_state_of_another_pressure_is_refused(wrong: dict[str, Any]) -> None:
    _, _, schedule = build(Pressure(0.7))
    state = schedule.state_dict()
    with pytest.raises(PlasticError, match="state of the pressure is not one of parameters on a linear scale"):
        schedule.load_state_dict({**state, "pressure": {**state["pressure"], **wrong}})
    assert_same(schedule.state_dict(), state)


def test_another_round_has_the_same_pressure() -> None:
    net, _, schedule = build(Pressure(0.7), [Stage(1, 7.0), Stage(1)])
    expected = schedule.penalty().item()
    for _ in range(2):
        schedule.step()
    schedule.wake()
    assert schedule.force.steps == 0
    assert schedule.penalty().item() == pytest.approx(expected)
    assert_same(pressed(net, schedule.penalty()), pressed(net, net.penalty(0.7, "parameters")))
