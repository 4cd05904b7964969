"""Budgets: met at the first try, whatever the loss, the rates and the cost; and the other way round, by loss."""

from __future__ import annotations

import copy
import math
import pickle
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from plasticnet import Budget, Growth, PlasticError, PlasticNet, Schedule, Stage, load_checkpoint, save_checkpoint
from plasticnet.budgets.projection import project
from plasticnet.cost.latency import Latency, Term
from tests.kit.networks import ConvNet, assert_same, images, mlp

COSTS = {"params": "parameters", "macs": "macs", "units": "units"}
STAGES = (Stage(1), Stage(8, 7.0), Stage(1))


def task(n: int = 256) -> tuple[Tensor, Tensor]:
    """Four classes, told apart by the signs of two of eight inputs."""
    x = torch.randn(n, 8)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def build(budget: Budget, *, sgd: bool = False, gate_lr: float = 0.05, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = PlasticNet(mlp(8, 40, 24, 4), (torch.randn(2, 8),))
    if isinstance(budget, Budget) and budget.latency_ms is not None:  # measured anew, it is never the same
        gated = {"0.weight": ((0,), (40,)), "2.weight": ((0, 1), (24, 40)), "4.weight": ((1,), (24,))}
        terms = tuple(Term(name, name, *dims, 1 + random.random()) for name, dims in gated.items())
        net.use_latency(Latency(terms, (), sum(t.milliseconds for t in terms), 0, 0, 9, 3, "cpu", "float32", 1))
    weights, gates = net.param_groups(5e-3, gate_lr)
    del gates["betas"]
    optimizer: Optimizer = SGD([weights, gates], momentum=0.9) if sgd else Adam([weights, gates])
    return net, optimizer, Schedule(net, optimizer, options.pop("stages", STAGES), budget=budget, **options), *task()


def epoch(net: PlasticNet, optimizer: Optimizer, schedule: Schedule, x: Tensor, y: Tensor, scale: float = 1.0) -> float:
    """One epoch of eight steps; returns the loss of all samples."""
    net.train()
    for i in torch.randperm(len(x)).split(32):
        xs, ys = x[i], y[i]
        loss = net.expected_loss(lambda xs=xs, ys=ys: scale * F.cross_entropy(net(xs), ys, reduction="none"))
        optimizer.zero_grad()
        (loss + schedule.penalty()).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(net.eval()(x), y).item()


def run(net: PlasticNet, optimizer: Optimizer, schedule: Schedule, *data: Any) -> None:
    while schedule.epoch < schedule.epochs:
        schedule.step(epoch(net, optimizer, schedule, *data))


def reached(net: PlasticNet, cost: str) -> float:
    if cost == "units":
        return sum(len(s) for s in net.sites.values())
    if cost == "macs":
        return net.summary().macs
    return sum(p.numel() for p in net.compact().parameters())


def one_more(net: PlasticNet, cost: str) -> float:
    """What the cheapest unit of the hardened MLP would cost."""
    a, b = (len(s) for s in net.sites.values())
    bias = cost == "parameters"
    return 1 if cost == "units" else min(8 + bias + b, a + bias + 4)


def assert_met(net: PlasticNet, schedule: Schedule) -> None:
    """At most every target, and less than one of them by no more than 2 %, or no unit would fit."""
    assert all(bool(s.open.all()) for s in net.sites.values())
    targets = schedule.force.targets
    assert all(reached(net, c) <= t for c, t in targets.items())
    assert any(reached(net, c) > min(0.98 * t, t - one_more(net, c)) for c, t in targets.items())


# -- met --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.3, 0.1])
@pytest.mark.parametrize("cost", COSTS)
def test_met_at_the_first_try(cost: str, share: float) -> None:
    run(*(built := build(Budget(**{cost: share}))))
    assert_met(built[0], built[2])


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-5, 1e5])
@pytest.mark.parametrize("sgd", [False, True])
def test_the_pressure_brings_the_network_there_whatever_the_loss(scale: float, sgd: bool) -> None:
    """Before the projection has to: by the expected cost at the end of the plastic stage."""
    options = {"sgd": True, "gate_lr": 0.1 / scale} if sgd else {}
    net, optimizer, schedule, x, y = build(Budget(params=0.2), stages=[Stage(1), Stage(16, 7.0), Stage(1)], **options)
    if sgd:
        optimizer.param_groups[0]["lr"] /= scale  # so that the weights learn
    before = reached(net, "parameters")
    while schedule.epoch < 16:
        schedule.step(epoch(net, optimizer, schedule, x, y, scale))
    epoch(net, optimizer, schedule, x, y, scale)
    expected = net.penalty(1.0, "parameters").item()
    assert 0.5 * 0.2 < expected / before < 1.5 * 0.2
    schedule.step()
    assert_met(net, schedule)


def test_several_targets_hold_together() -> None:
    run(*(built := build(Budget(macs=0.3, units=25))))
    assert_met(built[0], built[2])


def test_a_network_with_convolutions_and_features() -> None:
    torch.manual_seed(0)
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    optimizer = Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, STAGES, budget=Budget(macs=0.4))
    run(net, optimizer, schedule, images(128), torch.arange(128) % 3)
    target = schedule.force.targets["macs"]
    assert net.summary().macs <= target
    assert net.summary().macs >= 0.75 * target  # a channel is 15 % of it


def test_latency_is_a_target_too() -> None:
    net = PlasticNet(mlp(64, 512, 512, 10), (torch.randn(2, 64),))
    net.measure_latency((torch.randn(256, 64),))
    pi = torch.cat([s.probability(math.inf) for s in net.sites.values()]).detach()
    full = float(net.cost.expected(pi, "latency"))
    targets = Budget(latency_ms=0.5 * full).targets(net)
    masks = project(net, {n: torch.rand(len(s)) for n, s in net.sites.items()}, targets)
    net.resize({n: np.flatnonzero(m).tolist() for n, m in masks.items()})
    pi = torch.cat([s.probability(math.inf) for s in net.sites.values()]).detach()
    assert 0.45 * full < float(net.cost.expected(pi, "latency")) <= 0.5 * full


def test_hibernation_leaves_enough_for_the_budget() -> None:
    net, _, schedule, _, _ = build(Budget(units=0.5))
    schedule.step()
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.copy_(torch.linspace(-3.0, -1.0, len(site)))
    change = schedule.step()
    assert sum(change.cut.values()) == 32
    assert [len(s) for s in net.sites.values()] == [20, 12]


def test_projection_opens_the_best_that_fit_and_closes_the_lowest() -> None:
    for low, high, kept in ((-1.0, -0.1, 32), (0.1, 1.0, 32)):
        net, _, schedule, _, _ = build(Budget(units=0.5), stages=[Stage(1, 7.0), Stage(1)], hibernate=0.0)
        with torch.no_grad():
            for site in net.sites.values():
                site.phi.copy_(torch.linspace(low, high, len(site)))
        weight = net.model[0].weight.detach()[-20:]
        schedule.step()
        assert sum(int(s.open.sum()) for s in net.sites.values()) == kept
        assert torch.equal(net.model[0].weight, weight)


def test_widths_stay_multiples_within_the_budget() -> None:
    run(*(built := build(Budget(params=0.3), multiple_of=8)))
    net, schedule = built[0], built[2]
    assert all(len(s) % 8 == 0 for s in net.sites.values())
    assert net.summary().open_parameters <= schedule.force.targets["parameters"]


def test_no_pressure_outside_of_plastic_stages_and_without_a_budget() -> None:
    net, optimizer, schedule, x, y = build(Budget(macs=0.1))
    assert schedule.penalty().item() == 0
    epoch(net, optimizer, schedule, x, y)
    schedule.step()
    epoch(net, optimizer, schedule, x, y)
    assert schedule.penalty().requires_grad
    assert Schedule(net, optimizer, STAGES).penalty().item() == 0


def test_sites_with_no_strength_feel_no_pressure() -> None:
    net, optimizer, schedule, x, y = build(Budget(macs=0.3))
    net.limit("2", strength=0.0)
    for _ in range(2):
        epoch(net, optimizer, schedule, x, y)
        schedule.step()
    net.train()
    net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    optimizer.zero_grad()
    schedule.penalty().backward()
    pressed = {n: bool(s.phi.grad.any()) for n, s in net.sites.items()}
    assert pressed == {"0": True, "2": False}


def test_multipliers_rise_above_the_target_and_fall_below() -> None:
    net, optimizer, schedule, x, y = build(Budget(macs=0.5), stages=[Stage(2, 7.0), Stage(1)])
    epoch(net, optimizer, schedule, x, y)
    schedule.step()
    epoch(net, optimizer, schedule, x, y)
    force = schedule.force
    for logit, rises in ((1.0, True), (-0.2, False)):
        with torch.no_grad():
            for site in net.sites.values():
                site.phi.fill_(logit)
        force.steps = 10**6  # the target has come down
        before = float(force.level)
        schedule.penalty()
        assert (float(force.level) > before) is rises


def test_what_was_cut_too_early_is_added_again() -> None:
    resized = []
    net, optimizer, schedule, x, y = build(Budget(macs=0.5), on_resize=resized.append)
    for _ in range(8):
        schedule.step(epoch(net, optimizer, schedule, x, y))
    first, second = net.sites
    net.resize({first: range(12), second: range(6)}, optimizer)
    epoch(net, optimizer, schedule, x, y)
    left = copy.deepcopy(net).eval()
    for site in left.sites.values():
        site.phi.data.fill_(1.0)
    left.k = math.inf
    resized.clear()
    change = schedule.step()
    assert change.grown
    assert not change.cut
    assert resized == [net]
    assert_met(net, schedule)
    assert 12 < len(net.sites[first]) <= 40 or 6 < len(net.sites[second]) <= 24
    assert torch.allclose(net.eval()(x), left(x), atol=1e-6)  # they come with outgoing weights of zero,
    run(net, optimizer, schedule, x, y)
    assert net.model.get_parameter("4.weight").count_nonzero() == 4 * len(net.sites[second])  # and learn
    assert_met(net, schedule)


def test_no_site_gets_more_units_than_it_had() -> None:
    net, optimizer, schedule, x, y = build(Budget(macs=0.5))
    for _ in range(8):
        schedule.step(epoch(net, optimizer, schedule, x, y))
    first, second = net.sites
    net.resize({first: range(3), second: range(3)}, optimizer)
    schedule.force.widths = {first: 5, second: 3}
    change = schedule.step(epoch(net, optimizer, schedule, x, y))
    assert change.grown == {first: 2}
    assert [len(s) for s in net.sites.values()] == [5, 3]


# -- growth -----------------------------------------------------------------------------------


def test_growth_leaves_half_of_the_plastic_epochs_to_the_pressure() -> None:
    _, _, schedule, _, _ = build(Budget(params=10**6), growth=Growth.paper())
    stopped = []
    for _ in range(8):
        schedule.step(1.0)
        stopped.append(schedule.growth is not None and schedule.growth.stopped)
    assert stopped == [False] * 4 + [True] * 4


# -- by loss ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_smallest_network_within_a_loss() -> None:
    sizes = []
    for allowed in (0.05, 0.5):
        net, optimizer, schedule, x, y = build(Budget(loss=allowed), stages=[Stage(6), Stage(30, 7.0), Stage(6)])
        full = reached(net, "parameters")
        best = math.inf
        while schedule.epoch < schedule.epochs:
            loss = epoch(net, optimizer, schedule, x, y)
            best = min(best, loss) if schedule.epoch < 6 else best
            schedule.step(loss)
        assert schedule.force.reference == best
        assert epoch(net, optimizer, schedule, x, y) <= best + allowed
        sizes.append(reached(net, "parameters"))
    assert sizes[1] < sizes[0] < 0.8 * full


def test_by_loss_the_strength_rises_within_the_limit_and_cuts_wait_above() -> None:
    net, optimizer, schedule, x, y = build(Budget(loss=0.1), stages=[Stage(2), Stage(20, 7.0), Stage(1)])
    for loss in (1.0, 1.2):
        schedule.step(loss)
    force = schedule.force
    assert force.reference == 1.0
    epoch(net, optimizer, schedule, x, y)
    with torch.no_grad():
        net.sites["0"].phi[10:] = 1.0
    schedule.step(1.0)
    with torch.no_grad():
        net.sites["0"].phi[:10] = -3.0
    levels = [float(force.level[0])]
    cuts = []
    for loss in (1.2, 1.11, 1.09, 0.9):
        cuts.append(schedule.step(loss).cut)
        levels.append(float(force.level[0]))
        assert net.sites["0"].open.all()  # they went back to where they were
        with torch.no_grad():
            net.sites["0"].phi[:10] = -3.0 if loss > 1.1 else 1.0
    assert cuts == [{}, {}, {"0": 10}, {}]
    assert [b > a for a, b in pairwise(levels)] == [False, False, True, True]
    assert force.reference == 1.0


def test_without_a_loss_before_the_first_plastic_one_counts() -> None:
    net, optimizer, schedule, x, y = build(Budget(loss=0.1), stages=[Stage(3, 7.0), Stage(1)])
    epoch(net, optimizer, schedule, x, y)
    for loss in (2.0, 1.0):
        schedule.step(loss)
    assert schedule.force.reference == 2.0


def test_what_cannot_be_met_is_refused() -> None:
    for stages in ([Stage(5)], [Stage(5, 0.0)], [Stage(2), Stage(5, 7.0)]):
        with pytest.raises(PlasticError, match="hardens"):
            build(Budget(macs=0.5), stages=stages)
    with pytest.raises(PlasticError, match=r"pn\.Budget"):
        build(0.3)  # pyright: ignore[reportArgumentType]
    net = build(Budget(macs=0.5))[0]
    with pytest.raises(PlasticError, match="less than a single one"):
        Budget(units=0.5 / sum(map(len, net.sites.values()))).absolute(net)


def test_a_target_that_has_become_impossible_stops_the_last_plastic_step() -> None:
    net, optimizer, schedule, x, y = build(Budget(units=0.3), stages=[Stage(2, 7.0), Stage(1)])
    epoch(net, optimizer, schedule, x, y)
    schedule.step()
    net.limit("*", minimum=min(map(len, net.sites.values())))
    state = copy.deepcopy((schedule.state_dict(), net.state_dict()))
    with pytest.raises(PlasticError, match="cannot be met"):
        schedule.step()
    assert_same((schedule.state_dict(), net.state_dict()), state)
    net.limit("*")
    schedule.step()
    assert_met(net, schedule)


def test_sites_without_pressure_take_none() -> None:
    net, optimizer, schedule, x, y = build(Budget(macs=0.5), stages=[Stage(2, 7.0), Stage(1)])
    net.limit("*", strength=0.0)
    epoch(net, optimizer, schedule, x, y)
    assert schedule.penalty().item() == 0.0


# -- resume, wake -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("budget", [Budget(macs=0.3, params=0.4), Budget(loss=0.3), Budget(latency_ms=1.0)])
@pytest.mark.parametrize("stop", [1, 4])
def test_resume_equals_the_uninterrupted(budget: Budget, stop: int, tmp_path: Path) -> None:
    net, optimizer, schedule, x, y = build(budget)
    for _ in range(stop):
        schedule.step(epoch(net, optimizer, schedule, x, y))
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint({**state, "rng": torch.get_rng_state()}, tmp_path / "run")
    run(net, optimizer, schedule, x, y)
    again, optimizer, schedule, x, y = build(budget)
    saved = load_checkpoint(tmp_path / "run")
    again.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["rng"])
    run(again, optimizer, schedule, x, y)
    assert_same(again.state_dict(), net.state_dict())


def test_met_again_after_waking() -> None:
    net, optimizer, schedule, x, y = build(Budget(params=0.3), growth=Growth.paper())
    run(net, optimizer, schedule, x, y)
    assert_met(net, schedule)
    schedule.wake()
    assert math.isnan(schedule.force.begun)
    sizes = []
    while schedule.epoch < schedule.epochs:
        epoch(net, optimizer, schedule, x, y)
        schedule.step(1 / (1 + schedule.epoch))
        sizes.append(reached(net, "parameters"))
    assert max(sizes) > schedule.force.targets["parameters"]
    assert_met(net, schedule)


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"macs": 0}, {"macs": -1.0}, {"params": math.nan}, {"units": "5"}, {"loss": 0.1, "macs": 0.5},
        {"macs": True}, {"macs": torch.ones(2)}, {"units": torch.tensor(True)}, {"params": torch.tensor(math.nan)},
    ],
)  # fmt: skip
def test_bad_budgets(options: dict[str, Any]) -> None:
    with pytest.raises(PlasticError, match="Budget"):
        Budget(**options)


def test_a_cost_that_there_is_not_names_those_that_there_are() -> None:
    with pytest.raises(PlasticError, match=r"Budget\(flops\).*macs.*params, units or latency_ms, or of loss"):
        Budget(flops=0.5)  # pyright: ignore[reportCallIssue]
    assert replace(Budget(macs=0.5), macs=0.25) == pickle.loads(pickle.dumps(Budget(0.25)))
    assert repr(Budget(0.5)) == "Budget(macs=0.5, params=None, units=None, latency_ms=None, loss=None)"


def test_shares_and_counts() -> None:
    net = PlasticNet(mlp(8, 40, 24, 4), (torch.randn(2, 8),))
    full = reached(net, "parameters")
    assert Budget(params=0.25, units=30).targets(net) == {"parameters": full / 4, "units": 30}
    assert Budget(params=1).targets(net) == {"parameters": full}
    assert Budget(params=net.cost.full("parameters") / 4) == Budget(params=full / 4)
    assert type(Budget(macs=torch.tensor(30)).macs) is int


def test_what_cannot_be_met_is_refused_at_once() -> None:
    net = PlasticNet(mlp(8, 5, 4), (torch.randn(2, 8),))
    with pytest.raises(PlasticError, match="smallest network"):
        build(Budget(params=10))
    with pytest.raises(PlasticError, match="measure_latency"):
        Schedule(net, Adam(net.parameters()), STAGES, budget=Budget(latency_ms=1.0))


def test_a_loss_is_needed() -> None:
    _, _, schedule, _, _ = build(Budget(loss=0.1))
    schedule.step()
    with pytest.raises(PlasticError, match="the budget needs the validation loss"):
        schedule.step()
    assert schedule.epoch == 1


def test_state_of_another_budget() -> None:
    _, _, schedule, _, _ = build(Budget(macs=0.3))
    state = schedule.state_dict()
    _, _, other, _, _ = build(Budget(params=0.3))
    with pytest.raises(PlasticError, match="state of the budget"):
        other.load_state_dict(state)


class Nothing(nn.Module):
    """A network whose loss does not depend on the gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 20), nn.Linear(20, 4)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).detach() + self.b.bias


def test_met_where_the_loss_says_nothing() -> None:
    net = PlasticNet(Nothing(), (torch.randn(2, 8),))
    optimizer = Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, STAGES, budget=Budget(units=0.3))
    with pytest.warns(UserWarning, match="no gate has moved"):
        run(net, optimizer, schedule, *task(64))
    assert sum(len(s) for s in net.sites.values()) == 6
