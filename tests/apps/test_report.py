"""The report's tables of what a network cost before, during and after."""

from __future__ import annotations

import html
import re
import warnings
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from plasticnet import PlasticNet, Take, profile
from plasticnet.apps.report import render

X = torch.randn(4, 6)


def mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def record(epoch: int, k: float | str, profiled: dict[str, Any] | None) -> dict[str, Any]:
    sizes = {"units": {"0": 5}, "parameters": 10, "macs": 8, "histogram": [5], "transition": 0.0, "val_score": 0.5}
    return {"run": "prune", "epoch": epoch, "k": k, **sizes, **({"profile": profiled} if profiled else {})}


def page(history: list[dict[str, Any]], **profiles: Any) -> list[list[str]]:
    """The cells of the report's rows, below the heading of the profile."""
    result = {"test_score": 0.5, "units": {"0": 5}, "parameters": 10, "macs": 8, "ms_per_1000": 1.0, **profiles}
    text = (
        render("title", {"prune": result}, history, {})
        .split("<h2>What the network cost</h2>")[1]
        .split("<h2>Settings</h2>")[0]
    )
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    return [*rows, [re.sub("<[^>]*>", " ", text)]]


@pytest.fixture(scope="module")
def measured() -> dict[int, dict[str, Any]]:
    return {n: profile(mlp(n), X, repeats=1, training=True).as_dict() for n in (3, 4, 5, 8, 9)}


def test_before_during_and_after(measured: dict[int, dict[str, Any]]) -> None:
    """During is the middle one of the plastic epochs that were profiled."""
    history = [record(e, k, measured.get(n)) for e, k, n in
               [(1, "inf", 9), (2, 7.0, 8), (3, 7.0, 0), (4, 7.0, 5), (5, 7.0, 4), (6, "inf", 4)]]  # fmt: skip
    rows = page(history, profile={"before": measured[9], "after": measured[3]})
    (text,) = rows.pop()
    assert "epoch 4" in text
    assert "a batch of 4" in text
    assert rows[0] == ["", "before", "during", "after"]
    assert rows[1] == ["MACs", "81", "45", "27"]
    assert rows[2] == ["parameters", "93", "53", "33"]
    assert rows[3] == ["peak activation memory", "288 B", "160 B", "96 B"]
    assert rows[5] == ["kept for the backward pass", "144 B", "80 B", "48 B"]
    assert rows[7] == ["", "MACs", "parameters", "peak activation memory", "ms"]
    assert rows[9][:10] == ["0", "54", "30", "18", "63", "35", "21", "288 B", "160 B", "96 B"]
    assert rows[10][:7] == ["2", "27", "15", "9", "30", "18", "12"]
    assert len(rows) == 11


def test_a_run_without_plastic_epochs(measured: dict[int, dict[str, Any]]) -> None:
    rows = page([record(1, "inf", measured[9]), record(2, "inf", measured[8])], profile={})
    assert rows[1] == ["MACs", "not recorded", "72", "not recorded"]


def test_a_run_from_before_profiles() -> None:
    ((text,),) = page([record(1, 7.0, None), record(2, 7.0, None)])
    assert text.split() == ["prune", "not", "recorded"]


def test_modules_that_are_gone_or_renamed() -> None:
    """A module behind a `Take` stays in its row, and one that is gone has a dash."""
    net = PlasticNet(mlp(5), (X,), inputs=("2",))
    after = mlp(5)
    after[2] = nn.Sequential(Take(torch.arange(2)), nn.Linear(2, 3))
    after[0] = nn.Identity()
    ends = {"before": profile(mlp(5), X).as_dict(), "after": profile(after, torch.randn(4, 6)).as_dict()}
    rows = page([record(1, 7.0, profile(net, X).as_dict()), record(2, 7.0, None)], profile=ends)
    names = {row[0]: row[1:] for row in rows[9:-1]}
    assert list(names) == ["0", "2"]
    assert names["0"][:6] == ["30", "30", "-", "35", "35", "-"]
    assert names["2"][:6] == ["15", "15", "6", "18", "18", "9"]


def test_no_value_is_taken_for_markup(measured: dict[int, dict[str, Any]]) -> None:
    """Whatever it is: the name of a network, a count of units, an epoch, or the size of a batch."""
    evil = "<script>alert(1)</script>"
    history = [{**record(e, 7.0, {**measured[5], "batch": evil}), "run": evil} for e in (1, 2)]
    history[1]["epoch"] = evil
    result = {"test_score": 0.5, "units": {"0": evil}, "parameters": 10, "macs": 8, "ms_per_1000": 1.0}
    text = render(evil, {evil: {**result, "profile": {"before": {**measured[9], "batch": evil}}}}, history, {})
    assert "<script" not in text
    assert text.count(html.escape(evil)) >= 6


HOSTILE = [
    "a$b", "$x", "$a$", r"\$a", r"$\frac", "<script>alert(1)</script>", "a&b", 'q"uo\'te', "new\nline", "a\tand\x00",
    "漢字", "\U0001f600", "é" * 3, "long" * 100, "_hidden", "-->", "]]>", "{0}", "%s", "\x1b[31m", "\u202eto the left",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_of_any_kind(name: str, measured: dict[int, dict[str, Any]]) -> None:
    """Modules are called as the user likes: in the pictures, in the tables, and among the settings."""
    profiled = {**measured[5], "rows": [{**row, "name": name} for row in measured[5]["rows"]]}
    history = [{**record(e, 7.0, profiled), "units": {name: 5, "other": 3}} for e in (1, 2)]
    result = {"test_score": 0.5, "units": {name: 5}, "parameters": 10, "macs": 8, "ms_per_1000": 1.0}
    ends = {"profile": {"before": profiled, "after": profiled}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = render(f"title {name}", {"prune": {**result, **ends}}, history, {"model": name, name: 1})
    assert "<script" not in text
    assert text.count("<svg") == text.count("</svg>") == 4
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        parsed = ElementTree.fromstring(svg)
        assert parsed.tag.endswith("svg")
    assert text.count(f"<td>{html.escape(name)}</td>") >= 2  # the row of a module, and a setting
