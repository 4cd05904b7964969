"""Projection: the network that is really cut keeps within its targets, and nothing that fits stays closed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plasticnet import PlasticError, PlasticNet
from plasticnet.budgets import projection
from plasticnet.budgets.projection import project
from plasticnet.units import InputUnits
from tests.kit.generated import Generated, networks
from tests.kit.networks import ConvNet, images, mlp

Masks = dict[str, np.ndarray]


def really(net: PlasticNet, masks: Masks) -> dict[str, float]:
    """The costs of a copy that is cut by ``masks`` and by what `prune` says then."""
    net = copy.deepcopy(net)
    net.resize({n: np.flatnonzero(m).tolist() for n, m in masks.items() if not m.all()})
    net.prune()
    summary = net.summary()
    return {
        "parameters": sum(p.numel() for p in net.compact().parameters()),
        "macs": summary.macs,
        "units": sum(len(s) for s in net.sites.values()),
    }


def random_scores(net: PlasticNet) -> dict[str, torch.Tensor]:
    return {n: torch.randn(len(s)) for n, s in net.sites.items()}


def with_unit(net: PlasticNet, masks: Masks, name: str, unit: int) -> Masks:
    """The masks with one more unit open, a feature together with its channel."""
    more = {n: m.copy() for n, m in masks.items()}
    more[name][unit] = True
    u = net.sites[name].units
    if isinstance(u, InputUnits):
        for other, site in net.sites.items():
            for s in site.units.slices:
                if s.tensor == name:
                    more[other] |= (s.index == u.features[unit]).any(1)
    return more


def check(net: PlasticNet, targets: Mapping[str, float], tried: int = 10) -> Masks:
    """The postcondition, on copies that are really cut."""
    masks = project(net, random_scores(net), targets)
    reached = really(net, masks)
    assert all(reached[c] <= target for c, target in targets.items())
    for name, mask in masks.items():
        assert mask.sum() >= min(net.sites[name].minimum, len(mask))
        assert mask[net.sites[name].grace.numpy() > 0].all()
    closed = [(n, int(i)) for n, m in masks.items() for i in np.flatnonzero(~m)]
    for j in torch.randperm(len(closed))[:tried].tolist():
        costs = really(net, with_unit(net, masks, *closed[j]))
        assert costs == reached or any(costs[c] > target for c, target in targets.items())
    return masks


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks, st.floats(0.02, 1.0), st.floats(0.02, 1.0), st.booleans(), st.integers(0, 10**6))
def test_generated_networks(model: Generated, macs: float, parameters: float, features: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net = PlasticNet(model, (torch.randn(2, 3, 4, 4),), inputs=("fc1",) if features else ())
    least = really(net, project(net, random_scores(net), {c: lowest(net, c) for c in ("macs", "parameters")}))
    summary = net.summary()
    targets = {
        "macs": least["macs"] + macs * (summary.macs - least["macs"]),
        "parameters": least["parameters"] + parameters * (summary.parameters - least["parameters"]),
    }
    check(net, targets)


def lowest(net: PlasticNet, cost: str) -> float:
    """The cost of the network with one unit a site, or more where channels of one site are told apart."""
    with pytest.raises(PlasticError, match="cannot be met") as error:
        project(net, random_scores(net), {cost: 0.0})
    return float(str(error.value).split("costs ")[1].split(f" {cost}")[0].replace(",", ""))


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["units", "parameters", "macs"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_one_target(cost: str, share: float) -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    every = {n: np.ones(len(s), dtype=bool) for n, s in net.sites.items()}
    least = lowest(net, cost)
    check(net, {cost: least + share * (really(net, every)[cost] - least)}, tried=40)


def test_the_lowest_scores_close() -> None:
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),))
    scores = {"0": torch.arange(6.0), "2": torch.arange(5.0) + 0.5}
    masks = project(net, scores, {"units": 5})
    assert {n: np.flatnonzero(m).tolist() for n, m in masks.items()} == {"0": [3, 4, 5], "2": [3, 4]}


def test_a_better_unit_that_does_not_fit_gives_way_to_one_that_does() -> None:
    """A unit of "0" costs 100 + 1 + 2 parameters, one of "2" only 2 + 1 + 1."""
    net = PlasticNet(mlp(100, 2, 3, 1), (torch.randn(2, 100),))
    scores = {"0": torch.tensor([9.0, 8.0]), "2": torch.tensor([7.0, 6.0, 5.0])}
    masks = project(net, scores, {"parameters": 101 + 3 * 2 + 3 + 1})
    assert {n: m.tolist() for n, m in masks.items()} == {"0": [True, False], "2": [True] * 3}


def test_everything_stays_where_there_is_room() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    masks = project(net, random_scores(net), {"macs": net.summary().macs})
    assert all(m.all() for m in masks.values())


def test_changes_nothing_and_repeats() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    before, scores = copy.deepcopy(net.state_dict()), random_scores(net)
    masks = [project(net, scores, {"macs": 0.3 * net.summary().macs}) for _ in range(2)]
    assert all((masks[0][n] == masks[1][n]).all() for n in net.sites)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_equal_scores_close_in_step() -> None:
    net = PlasticNet(mlp(4, 60, 40, 3), (torch.randn(2, 4),))
    masks = project(net, {n: torch.ones(len(s)) for n, s in net.sites.items()}, {"units": 50})
    assert {n: m.sum() for n, m in masks.items()} == {"0": 30, "2": 20}


def test_minimum_and_grace_stay() -> None:
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),))
    net.limit("2", minimum=3)
    net.sites["0"].grace[1] = 2
    scores = {"0": torch.tensor([5.0, -9.0, 3.0, 2.0, 1.0, 0.0]), "2": torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])}
    masks = project(net, scores, {"units": 5})
    assert {n: np.flatnonzero(m).tolist() for n, m in masks.items()} == {"0": [0, 1], "2": [0, 1, 2]}
    with pytest.raises(PlasticError, match=r"smallest network.* 5 units \(the target is 4\)"):
        project(net, scores, {"units": 4})


def test_blocks_may_all_close_unless_there_is_a_minimum() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.a(x).relu())

    model = torch.nn.Sequential(torch.nn.Linear(4, 6), Block(), Block(), torch.nn.Linear(6, 2))
    net = PlasticNet(model, (torch.randn(2, 4),), blocks=("1", "2"))
    name = next(n for n, s in net.sites.items() if s.units.name and not s.units.slices)
    scores = {n: torch.arange(float(len(s))) + 5 for n, s in net.sites.items()}
    scores[name] = torch.tensor([-1.0, -2.0])
    outside = 4 * 6 + 6 * 2  # multiply-adds without both blocks
    masks = project(net, scores, {"macs": outside})
    assert not masks[name].any()
    assert project(net, scores, {"macs": outside + 2 * 6 * 8})[name].tolist() == [True, False]
    net.limit(name, minimum=1)
    assert project(net, scores, {"macs": outside})[name].tolist() == [True, False]
    net.limit(name)  # back to what blocks have by default
    assert not project(net, scores, {"macs": outside})[name].any()


def missing(net: PlasticNet, targets: Mapping[str, float], widths: Mapping[str, int]) -> dict[str, int]:
    """Beside the best of those that are there."""
    keep = project(net, {n: s.phi for n, s in net.sites.items()}, targets)
    return projection.missing(net, keep, targets, widths)


def test_missing_units() -> None:
    net = PlasticNet(mlp(8, 40, 24, 4), (torch.randn(2, 8),))
    first, second = net.sites
    widths = {name: len(site) for name, site in net.sites.items()}
    assert missing(net, {"macs": net.summary().macs}, widths) == {}
    net.resize({first: range(20), second: range(12)})
    now = 8 * 20 + 20 * 12 + 12 * 4
    assert missing(net, {"macs": 1.02 * now}, widths) == {}
    assert missing(net, {"macs": now + 60}, widths) == {first: 60 // (8 + 12), second: 60 // (20 + 4)}
    assert missing(net, {"macs": now + 60, "units": 34}, widths) == {first: 2, second: 2}
    assert missing(net, {"macs": now + 60, "units": 32}, widths) == {}
    assert missing(net, {"macs": 10 * now}, widths) == {first: 20, second: 12}
    net.limit(first, maximum=21)
    assert missing(net, {"macs": 10 * now}, widths) == {first: 1, second: 12}


def test_nothing_is_missing_where_weights_or_features_can_open() -> None:
    x = torch.randn(2, 8)
    fine = PlasticNet(mlp(8, 40, 4), (x,), weights=("*",))
    assert missing(fine, {"macs": 1e6}, dict.fromkeys(fine.sites, 99)) == {}
    net = PlasticNet(mlp(8, 40, 4), (x,), inputs=("0",))
    assert missing(net, {"macs": 1e6}, dict.fromkeys(net.sites, 99)) == {"0": 59}


@pytest.mark.slow
def test_many_units_are_quick_to_choose_from() -> None:
    """The cost is asked for some tens of times, not once for each of 30,000 units."""
    net = PlasticNet(mlp(2, 20000, 10000, 2), (torch.randn(2, 2),))
    asked, expected = [], net.cost.expected
    net.cost.expected = lambda pi, cost: asked.append(cost) or expected(pi, cost)
    target = 0.1 * net.summary().macs
    asked.clear()
    masks = project(net, random_scores(net), {"macs": target})
    assert len(asked) < 100
    a, b = (int(m.sum()) for m in masks.values())
    assert target - max(b + 2, a + 2) < 2 * a + a * b + 2 * b <= target


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"0": torch.ones(6)}, "no scores for site '2'"),
        ({"0": torch.ones(6), "2": torch.ones(4)}, r"'2'.*\(4,\).*\(5,\)"),
        ({"0": torch.full((6,), torch.nan), "2": torch.ones(5)}, "'0'.*not all finite"),
    ],
)
def test_bad_scores(scores: dict[str, torch.Tensor], message: str) -> None:
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),))
    with pytest.raises(PlasticError, match=message):
        project(net, scores, {"units": 5})
