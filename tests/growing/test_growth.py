"""Growth by what the newest units are worth: when, how much, until when, and what it refuses."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
from tests.kit.networks import ConvNet, assert_same, images, mlp
from tests.kit.training import quadrants, train_epoch, xor

STAGES = (Stage(24, 7.0), Stage(2))


class Run:
    """A network that grows on a small task."""

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        start: int = 2,
        stages: Any = STAGES,
        seed: int = 0,
        easy: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.x, self.y = quadrants() if easy else xor()
        self.net = PlasticNet(mlp(4, 40, 24, 4) if model is None else model, (self.x[:2],))
        if start:
            narrow(self.net, start)
        self.optimizer = Adam(self.net.param_groups(1e-2, 0.1))
        self.growth = Growth()
        options = options or {"pressure": Pressure(1e-4)}
        self.schedule = Schedule(self.net, self.optimizer, stages, growth=self.growth, **options)

    def epoch(self) -> dict[str, int]:
        train_epoch(self.net, self.optimizer, self.schedule, self.x, self.y)
        return dict(self.schedule.step().grown)

    def widths(self) -> list[int]:
        return [len(s) for s in self.net.sites.values()]

    def to_the_end(self) -> list[list[int]]:
        found = []
        while self.schedule.epoch < self.schedule.epochs:
            self.epoch()
            found.append(self.widths())
        return found

    def state(self) -> dict[str, Any]:
        parts = {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}
        return {**{n: p.state_dict() for n, p in parts.items()}, "rng": torch.get_rng_state()}

    def load(self, state: Any) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])

    def accuracy(self) -> float:
        with torch.no_grad():
            return float((self.net.eval()(self.x).argmax(1) == self.y).float().mean())


# -- the rule ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_grows_stops_by_itself_and_solves_what_it_could_not_before() -> None:
    run = Run(pressure=Pressure(1e-5), stages=[Stage(60, 7.0), Stage(10)])
    widths = run.to_the_end()
    most = [max(w) for w in zip(*widths, strict=True)]
    assert all(n > 4 for n in most)
    assert run.growth.stopped
    assert all(n <= m for n, m in zip(widths[-1], most, strict=True))
    assert run.accuracy() > 0.9


@pytest.mark.slow
def test_what_costs_more_becomes_smaller() -> None:
    costs = []
    for price in (1e-5, 1e-4, 1e-3):
        run = Run(pressure=Pressure(price), stages=[Stage(24, 7.0), Stage(1)])
        run.to_the_end()
        costs.append(run.net.summary().parameters)
    assert costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize(("epochs", "patience"), [(24, 4), (80, 8)])
def test_units_that_are_not_worth_their_price_bring_no_more(epochs: int, patience: int) -> None:
    """Growth stops after four judgements and a tenth of the plastic epochs: long schedules leave units more time."""
    run = Run(pressure=Pressure(1.0), stages=[Stage(epochs, 7.0)])
    for _ in range(patience):
        assert not run.growth.stopped
        assert run.epoch() == {}
    assert run.growth.stopped
    assert max(run.widths()) <= 2


def test_the_growth_follows_from_worth_over_price() -> None:
    """Once something is learned, every site grows by r to the power of 1/4, at most to twice its units."""
    run = Run(start=3, easy=True)
    seen, left = [], 0
    for _ in range(12):
        train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y)
        before, learned = run.widths(), bool(run.growth.newest)
        found = {} if run.growth.stopped else run.growth.verdicts(run.net)
        costs = dict(zip(run.net.sites, run.net.cost.unit_costs("parameters"), strict=True))
        change = run.schedule.step()
        if not found or not learned or run.growth.stopped:
            continue
        assert {n: v.price for n, v in found.items()} == pytest.approx({n: 1e-4 * c for n, c in costs.items()})
        worth = sum(v.worth * v.samples for v in found.values())
        r = max(0.0, worth / sum(v.price * v.samples for v in found.values()))
        error = math.sqrt(sum((v.error * v.samples) ** 2 for v in found.values()))
        factor = min(2.0, r**0.25) if worth > 2 * error else 0.0
        for (name, v), n in zip(found.items(), before, strict=True):
            more = max(0, round(factor * n) - n) if v.worth > r / 16 * v.price else 0
            gone = v.worthless if change.grown else ()
            assert change.grown.get(name, 0) == (more or len(gone))
            assert change.cut.get(name, 0) == len(gone)
            left += len(gone)
        seen.append(factor)
    assert max(seen) > 1
    assert min(seen) < 1
    assert left


def test_only_the_newest_units_are_judged() -> None:
    run = Run(start=3, easy=True)
    before, grown = run.widths(), {}
    while not run.growth.newest:
        before, grown = run.widths(), run.epoch()
    assert {n: run.growth.newest[n] for n in grown} == grown
    missed, (first, second) = run.net.sampler.missed, run.widths()
    assert missed is not None
    came = [max(run.growth.newest[n], 4) for n in run.net.sites]  # at least four are judged
    expected = [*range(first - came[0], first), *range(first + second - came[1], first + second)]
    assert sorted(missed.units.tolist()) == expected
    assert sum(grown.values()) == first + second - sum(before)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "dead"), [(0, False), (1, True)])
def test_it_never_stalls(seed: int, dead: bool) -> None:
    """From one unit a site, which cannot solve the task, and may even be dead."""
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2))
    run = Run(model, start=1, seed=seed, stages=[Stage(40, 7.0), Stage(5)])
    if dead:
        with torch.no_grad():
            model[0].bias.fill_(-100.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    run.to_the_end()
    assert min(run.widths()) > 1
    assert run.accuracy() > 0.9


def test_units_that_die_after_the_first_growth_do_not_stop_it() -> None:
    """All units are judged, and none is missed, so the network has not learned anything, though it has grown before."""
    run = Run(start=1)
    while not run.growth.newest:
        run.epoch()
    assert isinstance(run.net.model, nn.Sequential)
    with torch.no_grad():
        for layer in (run.net.model[0], run.net.model[2]):
            assert isinstance(layer, nn.Linear)
            layer.bias.fill_(-100.0)
    before = run.widths()
    assert max(before) <= 4
    run.epoch()
    assert run.widths() == [2 * n for n in before]


@pytest.mark.parametrize(("pressure", "most"), [(1e-6, 16), (1e-2, 1)])
def test_a_network_that_learns_nothing_doubles_as_long_as_that_is_cheap(pressure: float, most: int) -> None:
    run = Run(start=1, pressure=Pressure(pressure), stages=[Stage(40, 7.0)])
    run.net.train()
    most_so_far = 1
    for _ in range(6):
        for i in torch.randperm(256).split(8):
            loss = run.net.expected_loss(lambda i=i: 1.0 + 0 * run.net(run.x[i]).sum(1)) + run.schedule.penalty()
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
        run.schedule.step()
        most_so_far = max([*run.widths(), most_so_far])
    assert run.growth.stopped
    assert most_so_far == most


# -- while it grows ---------------------------------------------------------------------------


def test_units_are_open_and_unpriced_until_it_has_stopped() -> None:
    run = Run(pressure=Pressure(1.0), stages=[Stage(12, 7.0)])
    history = []
    for _ in range(8):
        held = [bool((s.grace > 0).all()) for s in run.net.sites.values()]
        history.append((run.growth.stopped, all(held), run.schedule.penalty().item() > 0))
        run.epoch()
    # It stops after the fourth epoch; the units are held open for two more, in which nothing can press on them.
    assert history[:4] == [(False, True, False)] * 4
    assert history[4:6] == [(True, True, True)] * 2
    assert history[6][:2] == (True, False)


def test_half_of_the_plastic_epochs_are_left_to_the_pressure() -> None:
    run = Run(pressure=Pressure(1e-9), stages=[Stage(10, 7.0), Stage(1)], easy=True)
    stopped = []
    for _ in range(10):
        run.epoch()
        stopped.append(run.growth.stopped)
    assert stopped == [False] * 4 + [True] * 6


def test_it_keeps_within_the_limits() -> None:
    run = Run(pressure=Pressure(1e-9))
    run.net.limit("0", maximum=5)
    run.net.limit("2", minimum=4, maximum=7)
    widths = run.to_the_end()
    assert max(w[0] for w in widths) == 5
    assert max(w[1] for w in widths) == 7
    assert next(w for w in widths if w[1] > 2)[1] >= 4


def test_a_site_below_its_minimum_grows_whatever_it_is_worth() -> None:
    run = Run(pressure=Pressure(1.0))
    run.net.limit("0", minimum=5)
    assert run.epoch() == {"0": 3}


def test_features_come_back_and_never_more_than_there_were() -> None:
    torch.manual_seed(0)
    x, y = xor()
    net = PlasticNet(mlp(4, 8, 2), (x[:2],), inputs=("*",))
    narrow(net, 2)
    optimizer = Adam(net.param_groups(1e-2, 0.1))
    schedule = Schedule(net, optimizer, [Stage(40, 7.0)], growth=Growth(), pressure=Pressure(1e-5))
    seen = []
    for _ in range(20):
        train_epoch(net, optimizer, schedule, x, y)
        schedule.step()
        seen.append(len(net.sites["0.input"]))
    assert max(seen) == 4


def test_convolutions_with_batch_statistics_grow() -> None:
    torch.manual_seed(0)
    x = images(64)
    y = (x[:, 0].mean((1, 2)) > x[:, 0].mean()).long() + (x[:, 0, :4].mean((1, 2)) > 0).long()
    net = PlasticNet(ConvNet(), (x[:2],))
    narrow(net, 2)
    optimizer = Adam(net.param_groups(1e-2, 0.1))
    schedule = Schedule(net, optimizer, [Stage(12, 7.0)], growth=Growth(), pressure=Pressure(1e-7, "macs"))
    for _ in range(6):
        train_epoch(net, optimizer, schedule, x, y, batch=2)
        schedule.step()
    assert all(len(s) > 2 for s in net.sites.values())


def test_where_nothing_can_grow_it_is_refused() -> None:
    x, _ = xor()
    net = PlasticNet(mlp(4, 8, 4), (x[:2],), exclude=("0",), weights=("0",))
    optimizer = Adam(net.param_groups(1e-2, 0.1))
    with pytest.raises(PlasticError, match="no site of this network can grow"):
        Schedule(net, optimizer, [Stage(2, 7.0)], growth=Growth(), pressure=Pressure(1e-6))


def test_a_growth_belongs_to_one_schedule() -> None:
    run = Run()
    with pytest.raises(PlasticError, match="belongs to another schedule"):
        Schedule(run.net, run.optimizer, STAGES, growth=run.growth, pressure=Pressure(1e-4))


@pytest.mark.parametrize("options", [{"pressure": Pressure(1.0)}, {"budget": Budget(params=500)}])
def test_too_few_steps_are_said(options: dict[str, Any]) -> None:
    """And the pressure begins at once, that of a budget as well."""
    run = Run(stages=[Stage(6, 7.0), Stage(1)], **options)
    for _ in range(2):
        train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y, batch=256)
        run.schedule.step()
    train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y, batch=256)
    with pytest.warns(UserWarning, match="growth has ended before it began: .* which had 3 steps"):
        run.schedule.step()
    assert not any(bool(s.grace.any()) for s in run.net.sites.values())


def test_judgements_go_on_with_the_units_whose_turn_it_is() -> None:
    """Where the batch shares its gates, four judgements in a row are not four times the same one."""
    run = Run(mlp(4, 64, 64, 4), start=0, pressure=Pressure(1.0), easy=True)
    run.net.sampler.mode = "batch"
    seen: list[int] = []
    for _ in range(4):
        train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y)
        missed = run.net.sampler.missed
        assert missed is not None
        seen += missed.units[missed.counts > 0].tolist()
        run.schedule.step()
    assert sorted(seen) == list(range(128))


@pytest.mark.parametrize("batch", [256, 100])
def test_long_epochs_are_not_needed(batch: int) -> None:
    """An epoch of one step counts as one: units are judged after 32 of them."""
    run = Run(stages=[Stage(200, 7.0)])
    grown = []
    for epoch in range(80):
        train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y, batch=batch)
        if run.schedule.step().grown:
            grown.append(epoch + 1)
    steps = math.ceil(256 / batch)
    assert grown
    assert all(e * steps >= 32 for e in grown)
    assert all((b - a) * steps >= 32 for a, b in pairwise(grown))


# -- prices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["units", "macs", {"parameters": 1.0, "macs": 0.5}])
def test_prices_of_units(cost: Any) -> None:
    weights = cost if isinstance(cost, dict) else {cost: 1.0}
    for scale in ("linear", "log"):
        run = Run(pressure=Pressure(0.1, cost, scale))
        run.net.limit("2", strength=0.5)
        found = run.schedule.force.unit_prices(run.net)
        expected = dict.fromkeys(run.net.sites, 0.0)
        for name, weight in weights.items():
            whole = float(run.net.cost.full(name)) if scale == "log" else 1.0
            for site, units in zip(run.net.sites, run.net.cost.unit_costs(name), strict=True):
                expected[site] += 0.1 * weight * units / whole * (0.5 if site == "2" else 1.0)
        assert found == pytest.approx(expected)


def test_a_budget_is_grown_into_and_met() -> None:
    run = Run(budget=Budget(params=300), easy=True)
    sizes = []
    while run.schedule.epoch < run.schedule.epochs:
        run.epoch()
        sizes.append(run.net.summary().parameters)
    assert 250 < max(sizes) <= 1.25 * 300
    assert run.net.summary().parameters <= 300


@pytest.mark.parametrize("start", [(2, 2), (3, 20), (30, 3), (40, 24)])
def test_within_a_budget_widths_even_out_from_any_start(start: tuple[int, int]) -> None:
    """All sites pass their worst units on to those whose units are worth more, also where the budget was exceeded."""
    run = Run(start=0, budget=Budget(params=300), easy=True)
    run.net.resize({n: range(w) for n, w in zip(run.net.sites, start, strict=True)}, run.optimizer)
    sizes = []
    while run.schedule.epoch < run.schedule.epochs:
        run.epoch()
        sizes.append(run.net.summary().parameters)
    assert run.growth.stopped
    assert sizes[11] <= 1.25 * 300  # before the pressure begins
    assert 200 < sizes[-1] <= 300
    assert min(run.widths()) > 3
    assert run.accuracy() > 0.9


def test_a_budget_of_loss_grows_too() -> None:
    run = Run(budget=Budget(loss=0.02))
    for _ in range(6):
        train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y)
        run.schedule.step(1.0)
    assert min(run.widths()) > 2


# -- refusals ---------------------------------------------------------------------------------


def test_growth_without_a_price_is_refused_by_name() -> None:
    net = PlasticNet(mlp(4, 3, 2), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PlasticError, match=r"pressure=pn\.Pressure"):
        Schedule(net, optimizer, STAGES, growth=Growth())
    with pytest.raises(PlasticError, match="budget= to press"):
        Schedule(net, optimizer, STAGES, growth=Growth(), pressure=Pressure(0.1), budget=Budget(macs=0.5))
    with pytest.raises(PlasticError, match=r"write pn\.Growth\(\)"):
        Schedule(net, optimizer, STAGES, growth=True, pressure=Pressure(0.1))  # pyright: ignore[reportArgumentType]
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize("missing", ["penalty", "expected_loss"])
def test_a_loop_that_growth_cannot_judge_by_is_refused(missing: str) -> None:
    run = Run()
    run.net.train()
    for _ in range(3):
        loss = run.net(run.x).square().mean()
        if missing == "penalty":
            loss = run.net.expected_loss(lambda: run.net(run.x).square().mean(1))
        else:
            loss = loss + run.schedule.penalty()
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
    before = run.state()
    with pytest.raises(PlasticError, match=missing):
        run.schedule.step()
    assert_same(run.state(), before)
    run.epoch()


def test_a_site_that_the_user_resizes_is_judged_anew() -> None:
    run = Run(start=6)
    run.epoch()
    train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y)
    run.net.resize({"0": [0, 1]}, run.optimizer)
    train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y)
    assert run.schedule.step().grown == {}
    run.epoch()


# -- state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [8, 100])
@pytest.mark.parametrize("stop", [1, 3, 6, 16])
def test_resume_equals_the_uninterrupted(stop: int, batch: int, tmp_path: Path) -> None:
    def go(run: Run, until: int) -> None:
        while run.schedule.epoch < until:
            train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y, batch=batch)
            run.schedule.step()

    run = Run()
    go(run, stop)
    save_checkpoint(run.state(), tmp_path / "run")
    go(run, 18)
    again = Run()
    again.load(load_checkpoint(tmp_path / "run"))
    go(again, 18)
    assert_same(again.state(), run.state())


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {"newest": 3},
        {"missed": {"units": [0]}},
        {"stopped": "yes"},
        {"failed": "often"},
        {
            "missed": {
                "units": [99],
                "sizes": [2, 2],
                "rises": [0.0],
                "counts": [0.0],
                "squares": [0.0],
                "loss": 0.0,
                "steps": 1,
                "turn": 0,
            }
        },
    ],
)
def test_a_state_of_something_else_changes_nothing(wrong: Any) -> None:
    run = Run()
    run.epoch()
    before = run.growth.state_dict()
    with pytest.raises(PlasticError, match="growth"):
        run.growth.load_state_dict({**before, **wrong} if wrong else wrong)
    assert run.growth.state_dict() == before


def test_it_begins_anew_when_the_schedule_wakes() -> None:
    run = Run(stages=[Stage(12, 7.0), Stage(1)])
    run.to_the_end()
    assert run.growth.stopped
    assert run.net.sampler.missed is None
    run.schedule.wake()
    assert not run.growth.stopped
    widths: list[Tensor] = []
    run.epoch()
    assert run.net.sampler.missed is not None
    assert widths == []
