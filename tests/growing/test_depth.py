"""Growth by whole blocks: where they open, what judges them, their limits, and what is refused."""

from __future__ import annotations

import copy
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
from plasticnet.growing.moves import Moves, even_out, grow_together
from plasticnet.growing.verdicts import Verdict, beyond_chance
from tests.growing.test_moves import Prices
from tests.kit.blocks import After, InOrder, Reader, Stages
from tests.kit.networks import assert_same, mlp
from tests.kit.training import train_epoch

DEPTH = "layers.depth"
STAGES = (Stage(16, 7.0), Stage(1))


def ring(n: int = 256) -> tuple[Tensor, Tensor]:
    """A task that no linear network solves: whether two numbers lie outside of a circle."""
    x = torch.randn(n, 4)
    return x, (x[:, :2].norm(dim=1) > 1.18).long()


class Run:
    """A network that begins with one block, and grows."""

    def __init__(
        self,
        model: nn.Module | None = None,
        data: tuple[Tensor, Tensor] | None = None,
        *,
        stages: Any = STAGES,
        growth: Any = None,
        seed: int = 3,
        start: int = 3,
        blocks: str = "layers.?",
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.x, self.y = ring() if data is None else data
        torch.manual_seed(seed)
        self.net = PlasticNet(InOrder() if model is None else model, (self.x[:2],), blocks=[blocks])
        narrow(self.net, start, blocks=1)
        self.optimizer = Adam(self.net.param_groups(1e-2, 0.1))
        self.growth = Growth() if growth is None else growth
        options = options or {"pressure": Pressure(1e-6)}
        self.schedule = Schedule(self.net, self.optimizer, stages, growth=self.growth, **options)

    def epoch(self) -> dict[str, int]:
        train_epoch(self.net, self.optimizer, self.schedule, self.x, self.y)
        return dict(self.schedule.step().grown)

    def awake(self) -> int:
        return self.net.sites[DEPTH].awake

    def state(self) -> dict[str, Any]:
        parts = {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}
        return {**{n: p.state_dict() for n, p in parts.items()}, "rng": torch.get_rng_state()}

    def load(self, state: Any) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])


# -- the rule ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_blocks_open_where_depth_pays_and_not_where_it_does_not() -> None:
    """The second block is opened to see what it is worth; where a linear network is enough, no third one follows."""
    depths = {}
    for task in ("linear", "ring"):
        torch.manual_seed(0)
        x, y = ring(384)
        y = (x[:, 0] + x[:, 1] > 0).long() if task == "linear" else y
        stages = [Stage(2), Stage(16, 7.0), Stage(1)]
        run = Run(data=(x, y), stages=stages, seed=0, pressure=Pressure(3e-4))
        while not run.growth.stopped:
            run.epoch()
        depths[task] = run.awake()
    assert depths["linear"] < depths["ring"]


def test_no_block_opens_that_is_not_worth_its_price() -> None:
    run = Run(pressure=Pressure(1.0))
    for _ in range(4):
        assert run.epoch() == {}
    assert run.growth.stopped
    assert run.awake() == 1


def deep(awake: int) -> PlasticNet:
    """A network of eight blocks, of which some are awake."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(*[InOrder().layers[0] for _ in range(8)]), nn.Linear(6, 3))
    net = PlasticNet(model, (torch.randn(2, 4),), blocks=["1.?"])
    narrow(net, 6, blocks=awake)
    return net


def judged(worth: float, error: float = 0.0, depth: bool = False) -> Verdict:
    return Verdict(worth, 1.0, 1.0, error, depth=depth)


@pytest.mark.parametrize(
    ("awake", "units", "block", "opened"),
    [
        (1, 16.0, 16.0, 1),
        (1, 16.0, 2.0, 0),  # not by the factor of the units, which is 2
        (3, 16.0, 16.0, 3),
        (3, 16.0, 2.0, 1),
        (1, 4.0, 4.0, 0),  # 1.41 times one block is one block
        (2, 4.0, 4.0, 1),
        (2, 2.0, 2.0, 0),
        (1, 2.0, 6.0, 1),
        (2, 2.0, 3.0, 1),
        (2, 0.5, 3.0, 1),  # also where no unit pays
        (5, 100.0, 5.0, 0),  # it waits: its worth is less than a sixteenth of that of units
        (6, 16.0, 20.0, 2),  # no more sleep
    ],
)
def test_how_many_blocks_open(awake: int, units: float, block: float, opened: int) -> None:
    net = deep(awake)
    moves = grow_together(net, {"0": judged(units), "1.depth": judged(block, depth=True)}).allowed(net)
    assert moves.added.get("1.depth", 0) == opened


def test_units_and_blocks_are_beyond_chance_each_by_themselves() -> None:
    """The noise of units does not hide what blocks are worth, and the blocks of all sites are judged together."""
    sure, noisy = judged(3.0, error=1.0, depth=True), judged(1.0, error=2.0)
    assert beyond_chance({"a": noisy, "b": sure}) == {"b": sure}
    assert beyond_chance({"a": judged(9.0), "b": judged(1.0, error=2.0, depth=True)}) == {"a": judged(9.0)}
    several = {str(i): judged(1.5, error=1.0, depth=True) for i in range(2)}
    assert beyond_chance(several) == several
    assert beyond_chance({"0": several["0"]}) == {}


def test_limits_bind_depth() -> None:
    net = deep(2)
    net.limit("1.depth", maximum=3)
    found = {"0": judged(16.0), "1.depth": judged(16.0, depth=True)}
    assert grow_together(net, found).allowed(net).added["1.depth"] == 1
    net.limit("1.depth", minimum=4, maximum=4)
    assert Moves().allowed(net).added == {"1.depth": 2}
    assert Moves().allowed(net, deeper=False).added == {}


def test_within_a_budget_blocks_open_and_never_leave() -> None:
    net = deep(2)
    found = {"0": judged(1.0), "1.depth": judged(1.0, depth=True)}
    assert even_out(net, found, Prices(relative=True)).added["1.depth"] == 2
    moves = even_out(net, {**found, "1.depth": judged(0.0, depth=True)}, Prices(most=10, relative=True))
    assert "1.depth" not in moves.leaving
    assert moves.added.get("1.depth", 0) == 0


# -- while it grows ---------------------------------------------------------------------------


def test_the_newest_blocks_are_judged_and_what_sleeps_is_left_alone() -> None:
    run = Run()
    sites = run.net.sites
    assert [s.grace.tolist() for s in sites.values()] == [[3] * 3, [3] * 3, [-1] * 3, [-1] * 3, [3, -1, -1]]
    grown: dict[str, int] = {}
    while run.awake() == 1:
        grown = run.epoch()
    assert grown[DEPTH] == 1
    assert "layers.1.up" not in grown
    assert len(sites["layers.1.up"]) == len(sites["layers.0.up"])
    assert [len(sites["layers.2.up"]), sites["layers.2.up"].awake] == [3, 0]
    assert sites[DEPTH].grace.tolist() == [3, 3, -1]
    missed = run.net.sampler.missed
    assert missed is not None
    starts = dict(zip(sites, torch.tensor([0, *map(len, sites.values())]).cumsum(0).tolist(), strict=False))
    units = missed.units.tolist()
    assert [u - starts[DEPTH] for u in set(units) if u >= starts[DEPTH]] == [1]
    assert not any(starts["layers.2.up"] <= u < starts[DEPTH] for u in units)
    assert set(range(starts["layers.1.up"], starts["layers.2.up"])) <= set(units)
    turns = units.count(starts[DEPTH] + 1)
    assert turns == len(units) / 2
    assert run.schedule.penalty().item() == 0


def test_what_sleeps_when_growth_has_ended_sleeps_on() -> None:
    run = Run(pressure=Pressure(1e-6), stages=[Stage(6, 7.0), Stage(1)])
    run.net.limit(DEPTH, maximum=2)
    while run.schedule.epoch < run.schedule.epochs:
        run.epoch()
    assert run.net.sites[DEPTH].grace.tolist() == [0, 0, -1]
    assert run.net.sites["layers.2.up"].awake == 0
    small = run.net.eval().compact()
    with torch.no_grad():
        torch.testing.assert_close(small(run.x), run.net(run.x), rtol=0, atol=1e-5)
    run.net.limit(DEPTH, minimum=3)
    run.schedule.wake([Stage(8, 7.0), Stage(1)])
    assert run.epoch()[DEPTH] == 1  # in another round


def test_a_block_opens_below_the_minimum_whatever_it_is_worth() -> None:
    run = Run(pressure=Pressure(1.0))
    run.net.limit(DEPTH, minimum=2)
    assert run.epoch() == {DEPTH: 1}
    assert run.epoch() == {}


@pytest.mark.parametrize("target", [400, 90])
def test_a_budget_is_met_and_what_sleeps_is_not_opened_for_it(target: int) -> None:
    run = Run(budget=Budget(params=target), stages=[Stage(8, 7.0), Stage(1)])
    run.net.limit(DEPTH, maximum=2)
    sizes = []
    while run.schedule.epoch < run.schedule.epochs:
        run.epoch()
        sizes.append(run.net.summary().open_parameters)
    assert max(sizes) <= 1.25 * target
    assert run.net.summary().open_parameters <= target
    assert run.awake() <= 2
    small = run.net.eval().compact()
    assert sum(p.numel() for p in small.parameters()) == run.net.summary().open_parameters


def test_a_share_in_a_budget_refers_to_what_is_awake() -> None:
    run = Run()
    awake = run.net.summary().open_parameters
    assert Budget(params=0.5).targets(run.net) == {"parameters": awake / 2}
    assert Pressure(1.0, relative_to=run.net).relative_to == awake


def test_the_rule_of_the_paper_leaves_depth_alone() -> None:
    run = Run(growth=Growth.paper())
    run.net.limit(DEPTH, minimum=2)
    train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y)
    assert run.schedule.step(1.0).grown == {"stem": 1, "layers.0.up": 1}
    assert run.awake() == 1


def test_a_network_that_can_only_become_deeper_grows() -> None:
    torch.manual_seed(0)
    x, y = ring()
    exclude = ["stem", "layers.?.up"]
    for growth in (Growth(), Growth.paper()):
        net = PlasticNet(InOrder(), (x[:2],), blocks=["layers.?"], exclude=exclude)
        narrow(net, 3, blocks=1)
        optimizer = Adam(net.param_groups(1e-2, 0.1))
        options: Any = {"growth": growth, "pressure": Pressure(1e-6)}
        if growth.deeper:
            schedule = Schedule(net, optimizer, [Stage(8, 7.0)], **options)
            for _ in range(3):
                train_epoch(net, optimizer, schedule, x, y)
                schedule.step()
            assert net.sites[DEPTH].awake > 1
        else:
            with pytest.raises(PlasticError, match="no site of this network can grow"):
                Schedule(net, optimizer, [Stage(8, 7.0)], **options)


# -- state ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stop"), [("MLP", 1), ("MLP", 4), ("ResNet", 2)])
def test_resume_equals_the_uninterrupted(kind: str, stop: int, tmp_path: Path) -> None:
    def new() -> Run:
        if kind == "MLP":
            return Run()
        torch.manual_seed(1)
        x = torch.randn(64, 1, 6, 6)
        y = (x[:, 0, :3].mean((1, 2)) > 0).long()
        model = Stages(After, stages=1)
        return Run(model, (x, y), blocks="stages.0.?", start=2, pressure=Pressure(1e-7), stages=[Stage(16, 7.0)])

    def go(run: Run, until: int) -> None:
        while run.schedule.epoch < until:
            train_epoch(run.net, run.optimizer, run.schedule, run.x, run.y, batch=8 if kind == "MLP" else 4)
            run.schedule.step()

    run = new()
    go(run, stop)
    save_checkpoint(run.state(), tmp_path / "run")
    go(run, 6)
    assert next(s for n, s in run.net.sites.items() if n.endswith("depth")).awake > 1
    again = new()
    again.load(load_checkpoint(tmp_path / "run"))
    go(again, 6)
    assert_same(again.state(), run.state())


# -- refusals ---------------------------------------------------------------------------------


class NormAfter(nn.Module):
    """A block whose norm comes after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 6), nn.Linear(6, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize(
    ("net", "blocks", "message"),
    [
        (lambda: PlasticNet(InOrder(), (torch.randn(2, 4),), blocks=["layers.?"]), 0, "blocks=0"),
        (lambda: PlasticNet(InOrder(), (torch.randn(2, 4),), blocks=["layers.?"]), True, "whole number"),
        (lambda: PlasticNet(InOrder(), (torch.randn(2, 4),), blocks=["layers.?"]), 1.5, "at least 1"),
        (lambda: PlasticNet(mlp(4, 8, 2), (torch.randn(2, 4),)), 1, "name them when it is made"),
        (
            lambda: PlasticNet(Reader(NormAfter), (torch.randn(2, 5, 3),), blocks=["layers.?"]),
            1,
            r"layers\.1, layers\.2: no layer, .* Leave it out of the blocks= of PlasticNet",
        ),
    ],
)
def test_what_cannot_begin_shallow_is_refused(net: Any, blocks: Any, message: str) -> None:
    torch.manual_seed(0)
    made = net()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(PlasticError, match=message):
        narrow(made, 2, blocks=blocks)
    assert_same(made.state_dict(), before)


def test_a_block_that_stays_open_need_not_begin_as_the_identity() -> None:
    net = PlasticNet(Reader(NormAfter), (torch.randn(2, 5, 3),), blocks=["layers.?"])
    narrow(net, 2, blocks=3)
    assert not any(bool(s.asleep.any()) for s in net.sites.values())


def test_without_blocks_depth_is_left_alone() -> None:
    net = PlasticNet(InOrder(), (torch.randn(2, 4),), blocks=["layers.?"])
    narrow(net, 2)
    assert all(bool(s.open.all()) and s.awake == len(s) for s in net.sites.values())
