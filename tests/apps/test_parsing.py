"""Dataclasses from JSON: what does not belong there is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from plasticnet import Budget, PlasticError
from plasticnet.apps.own_data import Reading
from plasticnet.apps.parsing import parse
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
        ("config.seed", 2**64, "config.seed is a number with 20 digits, and too large"),
        ("config.batch", 2**31, "batch=2147483648: it must be 2,147,483,647 or less"),
        ("config.start", 2**63, "start=9223372036854775808: it must be"),
        ("reading.image_size", 10**6, "--image-size 1000000: it must be 10,000 or less"),
        ("reading.image_size", 0, "--image-size 0: it must be 1 or more"),
        ("reading.std", float("inf"), "--std inf: it must be a finite number"),
        ("reading.mean", float("nan"), "--mean nan: it must be a finite number"),
        ("reading.std", 0.0, "--std 0.0: it must be a number above 0"),
        ("config.price", 10**400, "config.price is a number with 401 digits, and too large"),
        ("config.epochs", 10**400, "config.epochs is a number with 401 digits, and too large"),
        ("data", "\ud800.csv", r"data is '\\ud800.csv', which holds what is no letter"),
        ("device", [], "device is a list, and must be one of cpu, cuda, mps"),
    ],
)
def test_what_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(PlasticError, match=message):
        Run.from_dict(changed(path, value))


@pytest.mark.parametrize("path", ["data", "reading.std", "config.k_end"])
def test_nothing_may_be_missing(path: str) -> None:
    with pytest.raises(PlasticError, match=rf"the field '{path.rpartition('.')[2]}'.* is missing"):
        Run.from_dict(changed(path, remove=True))


class Inner(TypedDict):
    size: int


class Outer(TypedDict):
    widths: dict[str, int]
    parts: list[Inner]
    k: Literal["inf"] | float
    more: NotRequired[str]


SOUND = {"widths": {"a": 3}, "parts": [{"size": 1}], "k": "inf"}


def test_a_record_is_plain_data_without_what_nobody_asks_for() -> None:
    assert parse(Outer, {**SOUND, "extra": 1, "parts": [{"size": 1, "extra": 2}]}) == SOUND
    assert parse(Outer, {**SOUND, "k": 7, "more": "text"}) == {**SOUND, "k": 7.0, "more": "text"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": {"a": "3"}}, "widths.a is '3', and must be a whole number"),
        ({"widths": {"\ud800": 3}}, "widths.a name is "),
        ({"widths": []}, "widths is a list, and must be an object"),
        ({"parts": [{}]}, r"the field 'size' in parts\[0\] is missing"),
        ({"parts": [7]}, r"parts\[0\] is 7, and must be an object"),
        ({"parts": {}}, "parts is an object, and must be a list"),
        ({"k": "7"}, "k is '7', and must be a number"),
        ({"more": None}, "more is None, and must be text"),
    ],
)
def test_what_is_refused_in_a_record(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlasticError, match=message):
        parse(Outer, {**SOUND, **change})


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
