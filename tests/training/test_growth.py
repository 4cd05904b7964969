"""Growth: it stops by itself, keeps within its bounds, and shields what is new."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from plasticnet import Growth, PlasticError, PlasticNet, narrow
from plasticnet.units import InputUnits
from tests.kit.networks import ConvNet, images, mlp


def plastic(model: nn.Module, *x: torch.Tensor, inputs: Sequence[str] = ()) -> PlasticNet:
    net = PlasticNet(model, x, inputs=inputs)
    net.k = 7.0
    return net


def small() -> PlasticNet:
    return plastic(mlp(4, 3, 3, 2), torch.randn(2, 4))


def sizes(net: PlasticNet) -> dict[str, int]:
    return {n: len(s) for n, s in net.sites.items()}


# -- when -------------------------------------------------------------------------------------


def test_stops_by_itself_when_the_loss_does_not_fall() -> None:
    net, growth = small(), Growth(patience=2, failures=3)
    grown = [growth.step(net, 1.0, None) for _ in range(20)]
    assert [bool(g) for g in grown] == [False, True] * 3 + [False] * 14  # the first period always counts
    assert growth.stopped
    assert sizes(net) == dict.fromkeys(("0", "2"), 3 + 2 + 3 + 4)
    assert not growth.step(net, 0.0, None)  # for good


def test_goes_on_while_the_loss_falls() -> None:
    net, growth = small(), Growth(rate=0.01, patience=2, failures=1, gain=0.03)
    for i in range(24):
        growth.step(net, 1 - 0.02 * i, None)  # 0.04 a period, more than 3 % of the first loss
    assert not growth.stopped
    assert sizes(net)["0"] == 3 + 12
    for i in range(4):
        growth.step(net, 0.52 - 0.01 * i, None)  # 0.02 a period
    assert growth.stopped


def test_gain_is_a_share_of_the_first_loss() -> None:
    for first, stopped in ((10.0, True), (0.1, False)):
        net, growth = small(), Growth(patience=1, failures=1, gain=0.1)
        growth.step(net, first, None)
        growth.step(net, first - 0.05, None)
        assert growth.stopped is stopped


def test_the_best_of_a_period_counts() -> None:
    net, growth = small(), Growth(patience=3, failures=1, gain=0.1)
    for loss in (1.0, 1.0, 1.0, 0.5, 2.0, 2.0):
        growth.step(net, loss, None)
    assert not growth.stopped
    for loss in (0.7, 0.7, 0.7):  # better than the period's last epochs, worse than the best so far
        growth.step(net, loss, None)
    assert growth.stopped


def test_the_papers_rule() -> None:
    net, growth = small(), Growth.paper()
    growth.hold(net)
    grown = [growth.step(net, loss, None) for loss in (1.0, 1.0, 0.9, 0.95, 0.9, 0.8)]
    one = {"0": 1, "2": 1}
    assert grown == [one, {}, one, {}, {}, one]
    for site in net.sites.values():
        assert site.probability(7.0)[3:].tolist() == [0.5] * 3  # on the cut, and under pressure
        assert not site.grace.any()
    assert not growth.stopped


def test_stopped_from_outside_and_begun_anew() -> None:
    net, growth = small(), Growth(patience=1, failures=2)
    assert growth.step(net, 1.0, None)
    growth.stop()
    assert growth.stopped
    assert not growth.step(net, 0.1, None)
    growth.reset()
    assert growth.state_dict() == pytest.approx(Growth().state_dict(), nan_ok=True)
    assert growth.step(net, 5.0, None)  # what was best before does not count


# -- how far ----------------------------------------------------------------------------------


def test_keeps_within_the_maximum() -> None:
    net, growth = small(), Growth(rate=1.0, patience=1, failures=9)
    net.limit("0", maximum=5)
    net.limit("2", maximum=4)
    for i in range(10):
        growth.step(net, 1 / (i + 1), None)
    assert sizes(net) == {"0": 5, "2": 4}
    assert growth.stopped  # no room left
    net.limit("*", maximum=2)
    assert Growth().counts(net, 0.5) == {}


def test_features_are_reopened_and_never_more_than_there_were() -> None:
    net = plastic(mlp(6, 3, 2), torch.randn(2, 6), inputs=("*",))
    net.resize({"0.input": [1, 4]})
    growth = Growth(rate=0.7, patience=1, failures=9)
    net.limit("0", maximum=4)
    seen = []
    for i in range(8):
        growth.step(net, 1 / (i + 1), None)
        seen.append(sizes(net)["0.input"])
    assert seen[:3] == [4, 6, 6]
    assert max(seen) == 6
    assert sizes(net)["0"] == 4
    assert growth.stopped


def test_features_behind_growing_channels() -> None:
    net = plastic(ConvNet(), images(), inputs=("fc1",))
    narrow(net, 2)
    growth = Growth(rate=1.0, patience=1, failures=9)
    net.limit("conv1", maximum=5)
    net.limit("conv3", maximum=4)
    for i in range(8):
        growth.step(net, 1 / (i + 1), None)
        units = net.sites["fc1.input"].units
        assert isinstance(units, InputUnits)
        assert len(net.sites["fc1.input"]) <= units.full == 4 * (len(net.sites["conv1"]) + len(net.sites["conv3"]))
    assert (sizes(net)["conv1"], sizes(net)["conv3"], sizes(net)["fc1.input"]) == (5, 4, 36)
    assert net(images()).shape == (4, 3)


def test_minimum_is_reached_at_once_and_kept_by_pruning() -> None:
    net = small()
    net.limit("0", minimum=6)
    assert Growth(rate=0.01).counts(net, 0.01) == {"0": 3, "2": 1}
    Growth(rate=0.01, patience=1).step(net, 1.0, None)
    assert sizes(net) == {"0": 6, "2": 4}
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.copy_(-1 - torch.arange(len(site)) / 10)
            site.grace.zero_()
    net.limit("0", minimum=2)
    assert net.prune(0.5) == {"0": 4, "2": 3}
    torch.testing.assert_close(net.sites["0"].phi.detach(), torch.tensor([-1.0, -1.1]))  # the likeliest


@pytest.mark.parametrize(
    ("pattern", "bounds", "message"),
    [("nope", {}, "nope"), ("0", {"minimum": -1}, "minimum=-1"), ("0", {"minimum": 4, "maximum": 3}, "maximum=3")],
)
def test_bad_limits_change_nothing(pattern: str, bounds: dict[str, Any], message: str) -> None:
    net = small()
    with pytest.raises(PlasticError, match=message):
        net.limit(pattern, **bounds)
    assert [(s.minimum, s.maximum) for s in net.sites.values()] == [(1, math.inf)] * 2


def test_bad_init() -> None:
    net = small()
    with pytest.raises(PlasticError, match="init='zero'"):
        Growth(patience=1, init="zero").step(net, 1.0, None)
    assert sizes(net) == {"0": 3, "2": 3}


# -- grace ------------------------------------------------------------------------------------


def penalty_gradient(net: PlasticNet) -> float:
    for site in net.sites.values():
        site.phi.grad = None
    net.penalty(1.0).backward()
    return sum(float(s.phi.grad.abs().sum()) for s in net.sites.values() if s.phi.grad is not None)


def test_units_are_open_and_unpriced_while_it_grows() -> None:
    net, growth = small(), Growth(patience=1, failures=2, grace=2)
    with torch.no_grad():
        net.sites["0"].phi.fill_(-1.0)  # closed, were it not for the grace
    assert penalty_gradient(net) > 0
    growth.hold(net)
    history = []
    for _ in range(6):
        assert (penalty_gradient(net) == 0) is bool((net.sites["0"].grace > 0).all())
        history.append(int(net.sites["0"].grace.max()))
        if history[-1]:
            assert all((s.probability(7.0) == 1).all() and (s.grace > 0).all() for s in net.sites.values())
            x, calls = torch.randn(5, 4), []
            net.train()
            loss = net.expected_loss(lambda x=x, calls=calls: (calls.append(1), net(x).pow(2).sum(1))[1])
            assert len(calls) == 1  # nothing is uncertain
            torch.testing.assert_close(loss, net.model(x).pow(2).sum(1).mean())
        for site in net.sites.values():
            site.grace.sub_(1).clamp_(min=0)  # as Schedule.step does
        growth.step(net, 1.0, None)
    # Held at 3 until it stops at the third step; then for grace = 2 epochs more.
    assert history == [3, 3, 3, 2, 1, 0]
    assert penalty_gradient(net) > 0


def test_new_units_start_open() -> None:
    net = small()
    Growth(patience=1).step(net, 1.0, None)
    assert len(net.sites["0"]) == 5
    torch.testing.assert_close(7 * net.sites["0"].phi[3:].detach(), torch.full((2,), 3.0))


# -- state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(1, 9))
def test_goes_on_from_its_state(stop: int) -> None:
    losses = [1.0, 0.9, 0.9, 0.8, 0.5, 0.5, 0.5, 0.49, 0.49, 0.49, 0.49, 0.49]
    options: dict[str, Any] = {"patience": 2, "failures": 2, "rate": 0.3}
    growth, net = Growth(**options), small()
    expected = [growth.step(net, loss, None) for loss in losses]
    first, net = Growth(**options), small()
    seen = [first.step(net, loss, None) for loss in losses[:stop]]
    second = Growth(**options)
    second.load_state_dict(first.state_dict())
    assert seen + [second.step(net, loss, None) for loss in losses[stop:]] == expected
    assert second.state_dict() == growth.state_dict()
    assert growth.stopped


def test_a_fresh_state_round_trips() -> None:
    growth = Growth()
    growth.load_state_dict(Growth().state_dict())
    assert math.isnan(growth.first)
    assert not growth.stopped


def test_a_state_of_something_else_changes_nothing() -> None:
    growth = Growth()
    with pytest.raises(PlasticError):
        growth.load_state_dict({"first": 1.0, "best": 2.0})
    assert math.isnan(growth.first)


# -- narrow -----------------------------------------------------------------------------------


def test_narrow_cuts_every_site_and_initialises_for_the_new_width() -> None:
    model = mlp(4, 400, 2, 3)
    net = PlasticNet(model, (torch.randn(2, 4),))
    wide = model[2].weight.detach().abs().max()
    assert wide <= 400**-0.5
    narrow(net, 4)
    assert sizes(net) == {"0": 4, "2": 2}  # a site that is narrower stays
    assert (model[0].out_features, model[2].in_features) == (4, 4)
    assert model[2].weight.abs().max() > 2 * wide  # drawn for 4 inputs, not for 400
    assert model[2].weight.abs().max() <= 0.5
    assert net(torch.randn(5, 4)).shape == (5, 3)
    assert all(s.open.all() for s in net.sites.values())


def test_narrow_spreads_over_the_features() -> None:
    kept = set()
    for seed in range(6):
        torch.manual_seed(seed)
        net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
        narrow(net, 3)
        units = net.sites["fc1.input"].units
        assert isinstance(units, InputUnits)
        assert set(sizes(net).values()) == {3}
        assert units.full == 4 * 6
        assert net.fc1.weight.shape == (3, 3)
        kept.add(tuple(units.features.tolist()))
        assert net(images()).shape == (4, 3)
    assert len(kept) > 1


def test_narrow_to_nothing() -> None:
    net = small()
    for units in (0, -1):
        with pytest.raises(PlasticError, match="at least 1"):
            narrow(net, units)
    assert sizes(net) == {"0": 3, "2": 3}
