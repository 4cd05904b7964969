"""The experiments about growth, on a task that takes a second."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plasticnet as pn
from plasticnet.apps.models import MLP

sys.path.append(str(Path(__file__).parents[2] / "experiments"))

import common
import growth_budget
import growth_lifelong
import growth_peers
import growth_rows
import growth_stalls
import growth_table
from growth_tasks import Part, Task, classes, wrong
from moons import CONFIG


@pytest.fixture
def small() -> Task:
    """Four clouds of points, of which two are close to each other."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(4, 6)

    def part(n: int) -> Part:
        y = torch.arange(n) % 4
        return centres[y] + 0.5 * torch.randn(n, 6), y

    return Task((part(256), part(64), part(64)), lambda: MLP([6, 24, 16, 4]), classes, wrong, 1e-4, 15, 8, 5e-3)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def test_a_digest_knows_code_and_not_comments() -> None:
    code = 'def f():\n    """One."""\n    return 1\n'
    assert growth_rows.digest(code) == growth_rows.digest("# why\ndef f():\n    return 1\n")
    assert growth_rows.digest(code) != growth_rows.digest(code.replace("return 1", "return 2"))


def test_rows_are_measured_once_for_each_rule(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run() -> growth_rows.Row:
        calls.append(1)
        return {"test": len(calls)}

    for _ in range(2):
        assert growth_rows.row("some", {}, {"seed": 0}, run, grows=True)["test"] == 1
        assert growth_rows.row("some", {}, {"seed": 1}, run, grows=False)["test"] == 2
    monkeypatch.setattr(growth_rows, "rule", lambda: "another")
    assert growth_rows.row("some", {}, {"seed": 0}, run, grows=True)["test"] == 3
    assert growth_rows.row("some", {}, {"seed": 1}, run, grows=False)["test"] == 2
    assert sorted(r["test"] for r in common.written("some")) == [2, 3]


def test_a_path_leaves_out_what_stays() -> None:
    assert growth_rows.path(["3-3", "3-3", "6-6", "3-3"]) == "3-3 6-6 3-3"


def test_splitting_changes_nothing_without_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    net = pn.PlasticNet(MLP([6, 5, 4, 3]), (x,))
    optimizer = torch.optim.Adam(net.param_groups(1e-2))
    net(x).sum().backward()
    optimizer.step()
    before = net.eval()(x)
    first, second = net.sites
    growth_peers.split(net, {first: 7, second: 3}, optimizer, noise=0.0)
    assert [len(s) for s in net.sites.values()] == [12, 7]
    torch.testing.assert_close(net(x), before)
    growth_peers.split(net, {first: 1, second: 1}, optimizer)
    assert (net(x) - before).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("way", growth_peers.PEERS)
def test_peers_end_with_the_widths_that_were_found(small: Task, way: str) -> None:
    row = growth_peers.run(small, way, 0, [7, 2])
    assert list(row["units"].values()) == [7, 2]
    assert row["peak"]["parameters"] == row["parameters"]
    widths = row["widths"].split()
    assert widths[-1] == "7-2"
    assert (len(widths) > 2) == (way != "known")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pruned", "grown"])
def test_budgets_are_kept_to(small: Task, way: str) -> None:
    row = growth_budget.run(small, way, 0, 150)
    assert 100 < row["parameters"] <= 150


@pytest.mark.slow
def test_a_life_has_all_its_stages(small: Task) -> None:
    life = growth_lifelong.Life((2, 4), True, 1.0, 15, (2, 4))
    stages = growth_lifelong.lived(small, life, 0)["stages"]
    assert [s["classes"] for s in stages] == [2, 4]
    assert [len(s["stages"]) for s in stages] == [1, 2]
    assert stages[0]["stages"] == [stages[0]["all"]]
    assert stages[1]["then"][1] == stages[1]["stages"][1]
    assert stages[1]["all"] == pytest.approx(sum(stages[1]["stages"]) / 2)  # as many images of each class
    (once,) = growth_lifelong.lived(small, replace(life, bounds=(4,), grows=False), 0)["stages"]
    assert list(once["units"].values()) == [24, 16]
    assert len(once["stages"]) == 2
    assert once["all"] > 90


def test_what_stays_at_hand() -> None:
    y = torch.tensor([0, 1, 2, 0, 1, 3, 0, 0])
    assert growth_lifelong.at_hand(y, 2, 3, 0.5).tolist() == [0, 3, 1, 2]
    assert growth_lifelong.at_hand(y, 0, 2, 0.5).tolist() == [0, 1, 3, 4, 6, 7]
    assert growth_lifelong.at_hand(y, 2, 4, 1.0).tolist() == [0, 3, 6, 7, 1, 4, 2, 5]


@pytest.mark.slow
def test_one_unit_is_where_the_moons_and_the_digits_begin(small: Task) -> None:
    assert growth_stalls.moons(0, replace(CONFIG, epochs=20))["widths"].split()[0] == "1-1"
    assert growth_stalls.digits(0, small)["parameters"] > 0


def test_shares_of_seeds() -> None:
    assert growth_table.share([1.0, 2.0, 3.0], 2.0) == "2 of 3"
