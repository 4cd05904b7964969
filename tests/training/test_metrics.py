"""The numbers of an epoch that a schedule hands over, and what loggers make of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Adam

from plasticnet import Budget, Growth, PlasticNet, Pressure, Schedule, Stage, narrow
from tests.kit.networks import mlp, small
from tests.kit.training import quadrants, train_epoch

STAGES = (Stage(1), Stage(3, 7.0), Stage(1))


def trained(hear: Any, stages: Any = STAGES, **options: Any) -> tuple[PlasticNet, Any]:
    torch.manual_seed(0)
    x, y = quadrants()
    net = PlasticNet(mlp(4, 12, 8, 4), (x[:2],))
    if "growth" in options:
        narrow(net, 2)
    optimizer = Adam(net.param_groups(1e-2, 0.1))
    schedule = Schedule(net, optimizer, stages, on_change=hear, **options)
    changes = []
    for _ in range(schedule.epochs):
        train_epoch(net, optimizer, schedule, x, y)
        changes.append(schedule.step())
    return net, changes


def test_every_epoch_has_its_numbers() -> None:
    heard: list[dict[str, float]] = []
    net, changes = trained(heard.append, budget=Budget(macs=0.4))
    assert [n["epoch"] for n in heard] == [1, 2, 3, 4, 5]
    assert [n["k"] for n in heard] == [7.0, 7.0, 7.0, math.inf, math.inf]
    for numbers, change in zip(heard, changes, strict=True):
        assert all(type(value) in (int, float) for value in numbers.values())
        assert numbers["cut"] == sum(change.cut.values())
        assert numbers["grown"] == sum(change.grown.values())
        assert numbers["undecided"] == change.transition
        assert numbers["units"] == sum(numbers[f"units/{name}"] for name in net.sites)
        assert {"multiplier/macs", "target/macs"} <= numbers.keys()
    size, last = net.summary(), heard[-1]
    assert (last["parameters"], last["macs"]) == (size.open_parameters, size.open_macs)
    assert last["macs"] <= last["target/macs"]


def test_what_presses_and_what_grows_is_said() -> None:
    heard: list[dict[str, float]] = []
    trained(heard.append, pressure=Pressure(1e-4), growth=Growth(), stages=[Stage(8, 7.0)])
    assert heard[0]["price/parameters"] == 1e-4
    assert heard[0]["growing"] == 1
    assert heard[-1]["growing"] == 0


def test_a_validation_loss_is_among_them_if_it_was_given() -> None:
    heard: list[dict[str, float]] = []
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(2)], on_change=heard.append)
    schedule.step(val_loss=0.25)
    schedule.step()
    assert heard[0]["val_loss"] == 0.25
    assert "val_loss" not in heard[1]


def test_listening_changes_nothing() -> None:
    first, _ = trained(None, pressure=Pressure(1e-3))
    second, _ = trained(lambda numbers: numbers.clear(), pressure=Pressure(1e-3))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_tensorboard_reads_them(tmp_path: Path) -> None:
    """The recipe of the docs: one line in the schedule."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))

    def log(numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, numbers["epoch"])

    net, _ = trained(log, pressure=Pressure(1e-3))
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"k", "parameters", "price/parameters", *(f"units/{name}" for name in net.sites)} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("macs")] == [1, 2, 3, 4, 5]
    assert events.Scalars("macs")[-1].value == net.summary().open_macs
