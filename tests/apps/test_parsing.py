"""Dataclasses from JSON: what does not belong there is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plasticnet import Budget, PlasticError
from plasticnet.apps.own_data import Reading
from plasticnet.apps.settings import Config, Run, device_of, usual_batch, usual_epochs

RUN = Run(
    "my.csv", Reading(target="price", ignore=("key",), task="regression"), "mlp:4", "prune", "cpu",
    Config(budget=Budget(macs=0.3), inputs=("*",), lr=0.1 + 0.2),
)  # fmt: skip


def changed(path: str, value: Any = None, *, remove: bool = False) -> dict[str, Any]:
    content = RUN.as_dict()
    *parents, name = path.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    if remove:
        del inner[name]
    else:
        inner[name] = value
    return content


def test_a_run_comes_back_as_it_was() -> None:
    assert Run.from_dict(RUN.as_dict()) == RUN


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("extra", 1, "the field 'extra' is not known; the fields are data, reading"),
        ("config.penalty", 1, "the field 'penalty' in config is not known"),
        ("config.lr", "fast", "config.lr is 'fast', and must be a number"),
        ("config.epochs", 3.5, "config.epochs is 3.5, and must be a whole number"),
        ("config.epochs", True, "config.epochs is True, and must be a whole number"),
        ("config.inputs", ["a", 1], r"config.inputs\[1\] is 1, and must be text"),
        ("config.inputs", "a", "config.inputs is 'a', and must be a list"),
        ("config.cost", "flops", "config.cost is 'flops', and must be one of units, parameters, macs"),
        ("config.budget", {"macs": 0.5}, "the field 'params' in config.budget is missing"),
        ("config", [], "config is a list, and must be an object of JSON"),
        ("device", "auto", "device is 'auto', and must be one of cpu, cuda, mps"),
        ("mode", "both", "mode is 'both', and must be one of prune, grow, dense, compare"),
        ("reading.task", "ranking", "reading.task is 'ranking'"),
        ("model", "mlp", "can only grow"),
        ("config.price", -1.0, r"price=-1\.0"),
    ],
)
def test_what_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(PlasticError, match=message):
        Run.from_dict(changed(path, value))


@pytest.mark.parametrize("path", ["data", "reading.std", "config.k_end"])
def test_nothing_may_be_missing(path: str) -> None:
    with pytest.raises(PlasticError, match=rf"the field '{path.rpartition('.')[2]}'.* is missing"):
        Run.from_dict(changed(path, remove=True))


def test_what_is_usual() -> None:
    assert [usual_epochs(n) for n in (100, 500, 1000, 30_000, 60_000, 10**6)] == [200, 120, 60, 60, 30, 20]
    assert [usual_batch(n) for n in (100, 3200, 10**6)] == [32, 100, 256]


def test_devices() -> None:
    assert device_of("cpu") == "cpu"
    assert device_of("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(PlasticError, match="choose one of cpu, cuda, mps, auto"):
        device_of("tpu")


def test_an_mlp_without_widths_is_built_from_the_start() -> None:
    run = replace(RUN, model="mlp", mode="grow", config=Config(start=5))
    assert (run.built, run.limited) == ("mlp:5-5", False)
    assert (RUN.built, RUN.limited) == ("mlp:4", True)
