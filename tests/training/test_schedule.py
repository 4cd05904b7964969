"""Schedule: k over the stages, hibernation, hardening."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from plasticnet import (
    Budget,
    Growth,
    PlasticError,
    PlasticNet,
    Pressure,
    Schedule,
    Stage,
    load_checkpoint,
    save_checkpoint,
)
from tests.kit.networks import assert_same, mlp, set_probabilities, small, train_step

INF = math.inf


# -- stages -----------------------------------------------------------------------------------


def test_k_follows_the_stages() -> None:
    net, optimizer = small()
    stages = [Stage(2, 0), Stage(0, 3.0), Stage(1), Stage(2, 7.0), Stage(1, 9.0), Stage(2)]
    schedule = Schedule(net, optimizer, stages)
    assert schedule.epochs == 8
    seen = []
    for epoch in range(schedule.epochs):
        seen.append(net.k)
        assert schedule.epoch == epoch
        assert schedule.stage.k == net.k
        assert schedule.step().k == net.k
    assert seen == [0, 0, INF, 7, 7, 9, INF, INF]
    assert net.k == INF
    assert schedule.stage is stages[-1]


@pytest.mark.parametrize("before", [0.0, INF])
def test_open_gates_enter_a_plastic_stage_at_095(before: float) -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1, before), Stage(1, 4.0)])
    with torch.no_grad():
        net.sites["0"].phi.copy_(torch.tensor([0.01, 5.0, -0.2, 0.0, 1.0, -3.0]))
    schedule.step()
    expected = torch.tensor([0.9526, 0.9526, -1, 0.9526, 0.9526, -1])
    pi = net.sites["0"].probability(4.0).detach()
    torch.testing.assert_close(pi[expected > 0], expected[expected > 0], atol=1e-4, rtol=0)
    assert net.sites["0"].phi[[2, 5]].tolist() == pytest.approx([-0.2, -3.0])  # closed ones stay


def test_gates_stay_between_plastic_stages() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1, 4.0), Stage(1, 6.0)])
    set_probabilities(net, "0", 0.2, 0.3, 0.4, 0.6, 0.7, 0.8)
    phi = net.sites["0"].phi.detach().clone()
    schedule.step()
    assert torch.equal(net.sites["0"].phi, phi)


def test_hibernation_cuts_what_is_below_the_threshold() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(9, 7.0)], hibernate=0.05)
    set_probabilities(net, "0", 0.9, 0.04, 0.06, 0.3, 0.01, 0.5)
    phi = net.sites["0"].phi.detach()[[0, 2, 3, 5]]
    weight = net.model[0].weight.detach()[[0, 2, 3, 5]]
    change = schedule.step(0.1)
    assert (change.cut, change.grown, change.k) == ({"0": 2}, {}, 7.0)
    assert torch.equal(net.sites["0"].phi, phi)
    assert torch.equal(net.model[0].weight, weight)
    assert schedule.step().cut == {}
    set_probabilities(net, "0", 0.01, 0.02, 0.04, 0.03)
    weight = net.model[0].weight.detach()[[2]]
    assert schedule.step().cut == {"0": 3}  # the best one stays
    assert torch.equal(net.model[0].weight, weight)
    train_step(net, optimizer)


def test_grace_shields_from_hibernation_and_runs_out() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(9, 7.0)])
    set_probabilities(net, "0", 0.9, 0.001, 0.9, 0.001, 0.9, 0.9)
    net.sites["0"].grace[1] = 3
    assert schedule.step().cut == {"0": 1}
    assert net.sites["0"].grace.tolist() == [0, 2, 0, 0, 0]
    assert [schedule.step().cut for _ in range(2)] == [{}, {"0": 1}]


def test_hardening_cuts_the_closed_and_opens_the_rest() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1, 7.0), Stage(2)])
    set_probabilities(net, "0", 0.9, 0.49, 0.51, 0.3, 0.2, 0.5)
    set_probabilities(net, "2", 0.1, 0.2, 0.45, 0.3, 0.4)
    net.sites["0"].grace[3] = 5  # ends here: at k = inf nothing is held open
    x = torch.randn(5, 4)
    kept = net.model[0].weight.detach()[[0, 2, 5]]
    assert schedule.step().cut == {"0": 3, "2": 4}
    assert torch.equal(net.model[0].weight, kept)
    assert not net.sites["0"].grace.any()
    net.eval()
    assert torch.equal(net(x), net.model(x)) is bool(net.sites["2"].open.all())
    before = [s.phi.detach().clone() for s in net.sites.values()]
    for _ in range(3):
        train_step(net, optimizer)
    assert all(torch.equal(s.phi, b) for s, b in zip(net.sites.values(), before, strict=True))


def test_the_unit_that_a_closed_site_keeps_is_open() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1, 7.0), Stage(2)])
    set_probabilities(net, "2", 0.1, 0.2, 0.45, 0.3, 0.4)
    schedule.step()
    assert net.sites["2"].open.tolist() == [True]
    assert net.summary().open_parameters == sum(p.numel() for p in net.compact().parameters())


def test_hardening_from_dropout_cuts_the_closed_too() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1, 7.0), Stage(1, 0), Stage(1)])
    set_probabilities(net, "0", 0.9, 0.3, 0.4, 0.9, 0.9, 0.9)
    assert schedule.step().cut == {}
    assert schedule.step().cut == {"0": 2}


def test_ends_hardened_only_by_a_stage() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1, 7.0)])
    set_probabilities(net, "0", 0.9, 0.4, 0.9, 0.4, 0.9, 0.9)
    assert schedule.step().cut == {}
    assert net.k == 7.0


def test_gates_moments_go_when_k_changes() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1, 5.0), Stage(1, 5.0), Stage(1, 7.0), Stage(1)])
    phi = net.sites["0"].phi
    kept = []
    for _ in range(3):
        train_step(net, optimizer)
        assert optimizer.state[phi]
        schedule.step()
        phi = net.sites["0"].phi
        kept.append(bool(optimizer.state.get(phi)))
        assert optimizer.state[net.model[0].weight]  # the weights keep theirs
    assert kept == [True, False, False]


def test_several_optimizers() -> None:
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),))
    weights, gates = net.param_groups(1e-2)
    optimizers = [SGD([weights], momentum=0.9), Adam([gates])]
    schedule = Schedule(net, optimizers, [Stage(1, 7.0), Stage(1)])
    set_probabilities(net, "0", 0.9, 0.001, 0.9, 0.4, 0.9, 0.9)
    x = torch.randn(6, 4)
    net.train()
    (net.expected_loss(lambda: net(x).pow(2).sum(1)) + net.penalty(1.0)).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert schedule.step().cut == {"0": 2}
    assert not optimizers[1].state
    assert {p for g in optimizers[0].param_groups for p in g["params"]} == set(net.model.parameters())
    assert {p for g in optimizers[1].param_groups for p in g["params"]} == {s.phi for s in net.sites.values()}


# -- cadence, widths, callback ----------------------------------------------------------------


def test_cuts_are_saved_up_until_they_pay() -> None:
    """One unit of 200 is not worth it, four are: 2 % of the network."""
    net = PlasticNet(mlp(4, 200, 3), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, [Stage(4, 7.0), Stage(1)])
    phi, cut = net.sites["0"].phi, []
    for closed in (1, 3, 4):
        with torch.no_grad():
            phi[:closed] = -5.0
        cut.append(schedule.step().cut)
    assert cut == [{}, {}, {"0": 4}]
    with torch.no_grad():
        net.sites["0"].phi[0] = -5.0
    assert schedule.step().cut == {"0": 1}  # at the end of the stage in any case
    assert len(net.sites["0"]) == 195


def test_parameters_count_where_multiply_adds_do_not() -> None:
    layers = [
        nn.Conv2d(3, 8, 5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 200),
        nn.ReLU(),
        nn.Linear(200, 50),
    ]
    net = PlasticNet(nn.Sequential(*layers), (torch.randn(2, 3, 40, 40),))
    schedule = Schedule(net, Adam(net.param_groups(1e-2)), [Stage(1, 7.0)])
    with torch.no_grad():
        net.sites["3"].phi[:6] = -5.0
    before = net.summary()
    assert schedule.step().cut == {"3": 6}
    after = net.summary()
    assert after.parameters < 0.98 * before.parameters
    assert after.macs > 0.99 * before.macs


@pytest.mark.parametrize("last", [Stage(1), Stage(1, 7.0)])
def test_widths_stay_multiples(last: Stage) -> None:
    net = PlasticNet(mlp(4, 32, 20, 3), (torch.randn(2, 4),))
    net.limit("2", minimum=1)
    optimizer = Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, [Stage(1, 7.0), last], multiple_of=8)
    with torch.no_grad():
        net.sites["0"].phi[:15] = -5.0
        net.sites["2"].phi.fill_(-5.0)
        net.sites["2"].phi[3] = -4.0
    x = torch.randn(6, 4)
    expected = net.eval()(x)
    schedule.step()
    assert {n: len(s) for n, s in net.sites.items()} == {"0": 24, "2": 8}
    assert int(net.sites["0"].open.sum()) == 17
    if last.k == INF:  # the one unit that has to be there is open, the padding is not
        assert net.sites["2"].open.tolist() == [False] * 3 + [True] + [False] * 4
    else:  # the one unit that has to be there starts anew
        with torch.no_grad():
            net.sites["2"].phi[3] = -4.0
        torch.testing.assert_close(net(x), expected)
    for _ in range(3):
        train_step(net, optimizer)
    assert net.sites["2"].open.sum() == (1 if last.k == INF else 0)
    torch.testing.assert_close(net.eval()(x), net.compact(multiple_of=8)(x))
    torch.testing.assert_close(net(x), net.compact()(x))


def test_on_resize_is_called_after_changes_of_size_only() -> None:
    net, optimizer = small()
    seen: list[tuple[int, int, float]] = []

    def on_resize(changed: PlasticNet) -> None:
        assert changed is net
        assert {p for g in optimizer.param_groups for p in g["params"]} == set(net.parameters())
        seen.append((len(net.sites["0"]), len(net.sites["2"]), net.k))

    stages = [Stage(1), Stage(4, 7.0), Stage(1)]
    schedule = Schedule(net, optimizer, stages, growth=Growth.paper(), on_resize=on_resize)
    for val_loss in (3.0, 2.0, 2.0, 2.0):  # opened; grown; nothing; nothing
        schedule.step(val_loss)
    assert seen == [(7, 6, 7.0)]
    with torch.no_grad():
        net.sites["0"].phi[:3] = -5.0
        net.sites["2"].phi[:2] = -0.01
    schedule.step(2.0)
    assert seen[1:] == [(4, 4, INF)]  # once, when all is done
    schedule.step()
    assert len(seen) == 2


# -- k that rises, recovery -------------------------------------------------------------------


def test_k_rises_geometrically_and_the_logits_stay() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1), Stage(5, 2.0, 32.0), Stage(1, 32.0), Stage(1, 9.0, 3.0), Stage(1)])
    seen = []
    for _ in range(schedule.epochs):
        seen.append(net.k)
        phi, probability = net.sites["0"].phi, net.sites["0"].probability(net.k).detach()
        before = phi.detach().clone()
        if 2 <= net.k < 32:
            train_step(net, optimizer)
            before = phi.detach().clone()
        change = schedule.step()
        assert change.k == net.k
        if 2 <= seen[-1] < 32 and schedule.epoch < 7:
            assert torch.equal(net.sites["0"].phi, before)
            assert optimizer.state[phi]  # the gates' moments stay within the stage
            assert (net.sites["0"].probability(net.k) >= probability).all()
    assert seen == pytest.approx([INF, 2, 4, 8, 16, 32, 32, 9, INF])


def test_transition_is_reported_and_goes_to_zero() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1), Stage(2, 5.0), Stage(1, 0), Stage(1)])
    assert schedule.step().transition == 0
    assert schedule.step().transition == pytest.approx(2 * 0.9526 * 0.0474, rel=1e-3)
    set_probabilities(net, "0", 0.5, 0.9, 0.9, 0.9, 0.9, 0.9)
    set_probabilities(net, "2", 0.7, 0.7, 0.7, 0.7, 0.7)
    assert schedule.step().transition == pytest.approx((0.5 + 5 * 0.18 + 5 * 0.42) / 11)
    assert schedule.step().transition == 0.5
    assert schedule.step().transition == 0


def test_one_stage_twice_is_two_stages() -> None:
    net, optimizer = small()
    stage = Stage(2, 7.0, 28.0)
    schedule = Schedule(net, optimizer, [stage, stage, Stage(1)])
    ks = [net.k]
    for _ in range(4):
        schedule.step()
        ks.append(net.k)
    assert ks == [7.0, 28.0, 7.0, 28.0, math.inf]


def test_a_round_that_ends_plastic_is_woken_too() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(2, 7.0)])
    set_probabilities(net, "0", *[0.999] * 6)
    for _ in range(2):
        schedule.step()
    schedule.wake()
    assert schedule.rounds == 2
    torch.testing.assert_close(net.sites["0"].probability(7.0).detach(), torch.full((6,), 0.9526), rtol=1e-3, atol=0)
    assert schedule.timeline.plastic_epochs() == (2, 4)


def test_a_site_that_dies_gets_its_best_units_back() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(9, 7.0)], hibernate=0.0)
    net.limit("2", minimum=2)
    phi = net.sites["2"].phi
    for _ in range(3):
        train_step(net, optimizer)
    set_probabilities(net, "0", 0.1, 0.2, 0.6, 0.1, 0.1, 0.1)
    set_probabilities(net, "2", 0.1, 0.3, 0.6, 0.2, 0.4)
    state = {key: value.clone() for key, value in optimizer.state[phi].items()}
    assert state["exp_avg"].all()
    schedule.step()
    expected = torch.tensor([0.1, 0.3, 0.9526, 0.2, 0.9526])
    torch.testing.assert_close(net.sites["2"].probability(7.0).detach(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        net.sites["0"].probability(7.0).detach(), torch.tensor([0.1, 0.2, 0.6, 0.1, 0.1, 0.1])
    )  # one is open, and one is enough
    now = optimizer.state[phi]
    state["exp_avg"][[2, 4]] = 0  # the direction is forgotten, the size is not
    assert all(torch.equal(now[key], value) for key, value in state.items())


def test_a_site_that_may_die_stays_dead() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(9, 7.0)], hibernate=0.0)
    net.sites["2"].minimum = 0
    set_probabilities(net, "2", 0.1, 0.3, 0.4, 0.2, 0.4)
    schedule.step()
    assert not net.sites["2"].open.any()


# -- lifelong ---------------------------------------------------------------------------------


def lifelong() -> tuple[PlasticNet, Adam, Schedule]:
    torch.manual_seed(0)
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    stages = [Stage(1), Stage(4, 7.0, 14.0), Stage(1)]
    return net, optimizer, Schedule(net, optimizer, stages, growth=Growth.paper())


def live(net: PlasticNet, optimizer: Adam, schedule: Schedule, epochs: int) -> list[tuple[dict[str, int], ...]]:
    """Epochs of a little training, in which a unit closes and the loss falls for two epochs of each round."""
    changes = []
    for _ in range(epochs):
        for _ in range(3):
            train_step(net, optimizer)
        if schedule.stage.plastic and schedule.epoch % 5 == 3:
            with torch.no_grad():
                net.sites["0"].phi[1] = -3.0
        change = schedule.step(max(1.0, 3.0 - schedule.epoch % 5) if schedule.stage.plastic else 1.0)
        changes.append((dict(change.cut), dict(change.grown)))
    return changes


def test_wakes_grows_and_prunes_again() -> None:
    net, optimizer, schedule = lifelong()
    with pytest.raises(PlasticError, match="epoch 0 of 6"):
        schedule.wake()
    first = live(net, optimizer, schedule, 6)
    assert any(g for _, g in first)
    assert any(c for c, _ in first)
    assert math.isinf(net.k)
    schedule.wake()
    assert (schedule.rounds, schedule.epochs, net.k) == (2, 11, 7.0)
    pi = torch.cat([s.probability(7.0).detach() for s in net.sites.values()])
    torch.testing.assert_close(pi, torch.full_like(pi, 0.9526), atol=1e-4, rtol=0)
    second = live(net, optimizer, schedule, 5)
    assert any(g for _, g in second)
    assert any(c for c, _ in second)
    assert math.isinf(net.k)
    assert all(s.open.all() for s in net.sites.values())
    schedule.wake([Stage(1, 3.0), Stage(1)])
    assert (schedule.rounds, schedule.epochs, net.k) == (3, 13, 3.0)


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_resume_in_the_second_round_equals_the_uninterrupted(stop: int, tmp_path: Path) -> None:
    def go(net: PlasticNet, optimizer: Adam, schedule: Schedule, until: int) -> None:
        while schedule.epoch < until:
            if schedule.epoch == schedule.epochs:
                schedule.wake()
            live(net, optimizer, schedule, 1)

    net, optimizer, schedule = lifelong()
    go(net, optimizer, schedule, stop)
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint({**state, "rng": torch.get_rng_state()}, tmp_path / "run")
    go(net, optimizer, schedule, 11)
    again, optimizer, schedule = lifelong()
    saved = load_checkpoint(tmp_path / "run")
    again.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["rng"])
    go(again, optimizer, schedule, 11)
    assert_same(again.state_dict(), net.state_dict())
    assert schedule.rounds == 2


@pytest.mark.parametrize(
    "force",
    [
        lambda: {"budget": Budget(units=0.5)},
        lambda: {"budget": Budget(units=0.5), "growth": Growth()},
        lambda: {"pressure": Pressure(1e-3), "growth": Growth()},
    ],
)
def test_resume_within_an_epoch_equals_the_uninterrupted(force: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    """A budget measures its pressure by the gradient of the step before, which may lie before the interruption."""

    def begun() -> tuple[PlasticNet, Adam, Schedule]:
        torch.manual_seed(0)
        net = PlasticNet(mlp(4, 8, 6, 3), (torch.randn(2, 4),))
        optimizer = Adam(net.param_groups(1e-2))
        return net, optimizer, Schedule(net, optimizer, [Stage(12, k=7.0), Stage(1)], **force())

    def steps(net: PlasticNet, optimizer: Adam, schedule: Schedule, count: int) -> None:
        for _ in range(count):
            x = torch.randn(6, 4)
            optimizer.zero_grad()
            (net.train().expected_loss(lambda x=x: net(x).square().mean(1)) + schedule.penalty()).backward()
            optimizer.step()

    net, optimizer, schedule = begun()
    steps(net, optimizer, schedule, 3)
    schedule.step(1.0)
    steps(net, optimizer, schedule, 2)
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
    save_checkpoint({n: p.state_dict() for n, p in parts.items()}, tmp_path / "state")
    again, state = begun(), load_checkpoint(tmp_path / "state")
    for part, name in zip(again, parts, strict=True):
        part.load_state_dict(state[name])
    for run in ((net, optimizer, schedule), again):
        torch.manual_seed(5)
        steps(*run, 2)
        run[2].step(1.0)
    for part, other in zip(again, parts.values(), strict=True):
        assert_same(part.state_dict(), other.state_dict())
    with pytest.raises(PlasticError, match="gradient of the gates that is none"):
        again[2].load_state_dict({**state["schedule"], "gradient": "steep"})


def test_nothing_to_wake() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1)])
    schedule.step()
    with pytest.raises(PlasticError, match="no plastic stage"):
        schedule.wake()
    assert (schedule.epochs, schedule.rounds) == (1, 1)


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [
        (-1, 7.0),
        (3, -1.0),
        (3, math.nan),
        (3, "7"),
        (2.5, 7.0),
        (3, INF, 7.0),
        (3, 7.0, INF),
        (3, 0, 7.0),
        (3, 7.0, -1.0),
        (3, 7.0, "9"),
        (3, 10**400),
        (3, 10**5000),
        (3, 7.0, 10**400),
        (-(10**5000), 7.0),
    ],
)
def test_bad_stages(stage: tuple[Any, ...]) -> None:
    with pytest.raises(PlasticError, match="Stage"):
        Stage(*stage)


def test_no_epochs() -> None:
    net, optimizer = small()
    for stages in ([], [Stage(0), Stage(0, 7.0)]):
        with pytest.raises(PlasticError, match="at least one stage"):
            Schedule(net, optimizer, stages)


@pytest.mark.parametrize("budget", [Budget(loss=0.1), Budget(params=0.5), None])
@pytest.mark.parametrize("val_loss", ["a", "0.5", [0.5], torch.ones(2), 1 + 2j, 10**400])
def test_a_validation_loss_that_is_no_number(val_loss: Any, budget: Budget | None) -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1), Stage(3, 7.0), Stage(1)], budget=budget)
    for epoch in range(2):
        with pytest.raises(PlasticError, match=r"val_loss=.*is a number"):
            schedule.step(val_loss)
        assert schedule.epoch == epoch
        schedule.step(torch.tensor(0.5))  # pyright: ignore[reportArgumentType]


def test_no_loss_would_be_good_enough_after_one_of_minus_infinity() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1), Stage(3, 7.0), Stage(1)], budget=Budget(loss=0.1))
    for epoch in range(2):
        with pytest.raises(PlasticError, match="val_loss=-inf"):
            schedule.step(-math.inf)
        assert schedule.epoch == epoch
        schedule.step(0.5)


@pytest.mark.parametrize("val_loss", [None, math.nan])
def test_the_papers_growth_needs_a_validation_loss(val_loss: float | None) -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1), Stage(3, 7.0)], growth=Growth.paper())
    schedule.step(val_loss)  # not in ordinary training
    grace = net.sites["0"].grace.clone()
    with pytest.raises(PlasticError, match="val_loss"):
        schedule.step(val_loss)
    assert schedule.epoch == 1
    assert torch.equal(net.sites["0"].grace, grace)
    assert schedule.step(1.0).grown == {"0": 1, "2": 1}


def test_an_optimizer_of_something_else_is_refused_at_once() -> None:
    net, _ = small()
    state = copy.deepcopy(net.state_dict())
    for optimizer in (
        Adam(net.model.parameters()),
        Adam([s.phi for s in net.sites.values()]),
        Adam(mlp(2, 2).parameters()),
    ):
        with pytest.raises(PlasticError, match="do not hold"):
            Schedule(net, optimizer, [Stage(3, 7.0)])
    assert_same(net.state_dict(), state)


def test_no_epoch_after_the_last() -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1, 7.0)])
    schedule.step()
    set_probabilities(net, "0", 0.9, 0.001, 0.9, 0.9, 0.9, 0.9)
    with pytest.raises(PlasticError, match="over"):
        schedule.step()
    assert (schedule.epoch, len(net.sites["0"])) == (1, 6)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 4, "growth": None}, "epoch 4.*has 3"),
        ({"epoch": -1, "growth": None}, "epoch -1"),
        ({"epoch": 1, "growth": Growth().state_dict()}, "growth"),
        ({}, "epoch"),
        ({"epoch": "one", "growth": None}, "one"),
        ({"epoch": 1, "growth": None, "budget": {}}, "a budget"),
        ({"epoch": 1, "growth": None, "woken": [[1, 2, 3, 4]]}, "stages"),
    ],
)
def test_bad_states(state: dict[str, Any], message: str) -> None:
    net, optimizer = small()
    schedule = Schedule(net, optimizer, [Stage(1), Stage(2, 7.0)])
    with pytest.raises(PlasticError, match=message):
        schedule.load_state_dict(state)
    assert (schedule.epoch, net.k) == (0, INF)
