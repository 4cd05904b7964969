"""How many units come and leave, by what units are worth, on networks of which nothing was trained."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from plasticnet import PlasticNet
from plasticnet.growing.moves import Moves, even_out, grow_together
from plasticnet.growing.verdicts import Verdict, verdicts
from plasticnet.learning.missed import Missed
from tests.kit.networks import mlp


class Prices:
    """Prices of 1 a unit, with room for so many units in all."""

    def __init__(self, most: int = 10**6, relative: bool = False) -> None:
        self.most, self.relative = most, relative

    def unit_prices(self, net: PlasticNet) -> dict[str, float]:
        return dict.fromkeys(net.sites, 1.0)

    def has_room(self, net: PlasticNet, counts: Mapping[str, int]) -> bool:
        return sum(map(len, net.sites.values())) + sum(counts.values()) <= self.most


def network(*widths: int, inputs: tuple[str, ...] = ()) -> PlasticNet:
    return PlasticNet(mlp(4, *widths, 2), (torch.randn(2, 4),), inputs=inputs)


def worth(*each: float, first: int = 0) -> Verdict:
    """The verdict on units that were measured without any error, from a place on."""
    places = sorted(range(len(each)), key=lambda i: each[i])
    return Verdict(
        sum(each) / len(each), 1.0, len(each), 0.0, tuple(first + i for i in places),
        tuple(first + i for i, w in enumerate(each) if w < 1 / 16),
    )  # fmt: skip


def test_worthless_units_leave_where_others_come_and_are_replaced_where_a_site_waits() -> None:
    net = network(8, 8, 8)
    names = list(net.sites)
    found = {names[0]: worth(0, 60, 4, 0, first=4), names[1]: worth(0.01, 0.2, 0, 0.3, first=4), names[2]: worth(9, 9)}
    moves = grow_together(net, found)
    assert dict(moves.added) == {names[0]: 6, names[1]: 2, names[2]: 6}  # pooled r = 8.25, its 4th root 1.69
    assert dict(moves.leaving) == {names[0]: (4, 7), names[1]: (4, 6), names[2]: ()}


def test_nothing_leaves_where_nothing_comes() -> None:
    net = network(8)
    assert not grow_together(net, {"0": worth(0, 0, 3, 0)})


def test_within_a_budget_all_grow_while_there_is_room_those_that_are_worth_more_faster() -> None:
    net = network(10, 10)
    moves = even_out(net, {"0": worth(*[1.0] * 10), "2": worth(*[0.25] * 10)}, Prices(relative=True))
    assert moves.added["0"] == 10
    assert 4 < moves.added["2"] < 8
    assert not any(moves.leaving.values())


def test_without_room_the_least_missed_units_make_room_in_another_site() -> None:
    net = network(20, 4)
    each = [1.0 + i for i in range(20)]
    moves = even_out(net, {"0": worth(*each), "2": worth(*[4000.0] * 4)}, Prices(24, relative=True))
    assert moves.added["2"] == 4  # it doubles
    assert moves.leaving["0"] == (0, 1, 2, 3, 4, 5)  # as many as the common factor, at most 2, leaves to it


def test_a_network_that_is_too_large_loses_units_until_it_fits() -> None:
    net = network(20, 20)
    found = {"0": worth(*[1.0] * 20), "2": worth(*[1.0] * 20)}
    moves = even_out(net, found, Prices(36, relative=True))
    assert sum(map(len, moves.leaving.values())) >= 4
    assert not moves.added
    assert not even_out(net, found, Prices(40, relative=True))


def test_units_that_are_not_missed_at_all_are_replaced_within_a_budget() -> None:
    net = network(8, 8)
    dead = Verdict(4.0, 1.0, 8, 0.1, tuple(range(8)), (2, 5))
    moves = even_out(net, {"0": dead, "2": worth(*[4.0] * 8)}, Prices(relative=True))
    assert set(moves.leaving["0"]) == {2, 5}
    assert moves.added["0"] == 10


def test_what_a_minimum_keeps_is_not_there_for_others() -> None:
    net = network(8, 8)
    net.limit("0", minimum=8)
    moves = even_out(net, {"0": worth(*[0.0] * 8), "2": worth(*[1.0] * 8)}, Prices(20, relative=True)).allowed(net)
    net.resize(moves.sources(net))
    assert [len(s) for s in net.sites.values()] == [8, 12]


def test_dead_units_at_the_minimum_are_replaced_one_for_one() -> None:
    net = network(4, 4)
    net.limit("0", minimum=4)
    moves = grow_together(net, {"0": worth(-1, -1, -1, -1), "2": worth(100, 100, 100, 100)}).allowed(net)
    assert moves.added["0"] == len(moves.leaving["0"]) == 4


def test_a_site_without_room_does_not_starve_the_others() -> None:
    net = network(4, 4)
    net.limit("0", maximum=4)
    moves = even_out(net, {"0": worth(*[300.0] * 4), "2": worth(*[1.0] * 4)}, Prices(100, relative=True)).allowed(net)
    assert moves.added == {"2": 4}
    assert not moves.leaving


def test_no_site_loses_units_while_there_is_room_and_chance_moves_none() -> None:
    net = network(4, 4)
    found = {"0": worth(*[0.01] * 4), "2": worth(*[1.0] * 4)}
    quiet = {n: Verdict(v.worth, 1.0, 4, 0.0, v.ranked) for n, v in found.items()}
    assert not even_out(net, quiet, Prices(100, relative=True)).leaving
    assert even_out(net, quiet, Prices(8, relative=True)).leaving
    noisy = {n: Verdict(v.worth, 1.0, 4, 0.5, v.ranked) for n, v in found.items()}
    assert not even_out(net, noisy, Prices(8, relative=True))


def test_units_that_cost_nothing_double() -> None:
    net = network(4)
    assert grow_together(net, {"0": Verdict(1.0, 0.0, 4, 0.0, (0, 1, 2, 3))}).added == {"0": 4}


def test_limits_are_kept() -> None:
    net = network(8, 8)
    net.limit("0", minimum=6, maximum=9)
    allowed = Moves({"0": 10, "2": 1}, {"0": (7, 6, 5, 4), "2": tuple(range(8))}).allowed(net)
    assert allowed.leaving == {"0": (7, 6, 5, 4), "2": tuple(range(8))}
    assert allowed.added == {"0": 5, "2": 1}
    net.resize(allowed.sources(net))
    assert [len(s) for s in net.sites.values()] == [9, 1]
    net.resize(Moves({}, {"0": (8, 7, 6, 5)}).allowed(net).sources(net))
    assert [len(s) for s in net.sites.values()] == [6, 1]


def test_features_that_leave_do_not_come_back_at_once() -> None:
    net = network(8, inputs=("*",))
    net.resize({"0.input": [0, 1, 3]})
    allowed = Moves({"0.input": 3}, {"0.input": (0, 2)}).allowed(net)
    assert allowed.added == {"0.input": 1}
    net.resize(allowed.sources(net))
    assert net.sites["0.input"].features.tolist() == [1, 2]


@pytest.mark.parametrize("relative", [False, True])
def test_chance_speaks_for_units(relative: bool) -> None:
    """A unit is called worthless, and leaves before others, only if its worth is low by two standard errors."""
    net = network(4)
    missed = Missed(torch.arange(4), (4,))
    for rises in ([0.0, -0.5, -1.0, 1.0], [0.0, -0.5, 1.0, 1.0]):
        missed.note(torch.arange(4), torch.zeros(4), torch.tensor(rises))
    found = verdicts(net, missed, Prices(relative=relative))["0"]
    assert found.ranked == (0, 1, 2, 3)
    assert found.worthless == (0,)
    assert (found.worth, found.price, found.samples) == (0.125, 1.0, 8.0)


def test_units_of_which_nothing_depends_leave_before_those_that_were_unlucky() -> None:
    """By the mean alone, noisy units would leave and constant ones stay; one unit in five matters."""
    torch.manual_seed(0)
    net = network(40)
    missed = Missed(torch.arange(40), (40,))
    matters, constant = torch.arange(8), torch.arange(8, 40)
    rises = torch.randn(40, 20, dtype=torch.float64)
    rises[matters] += 0.3
    rises[constant] *= 1e-3
    missed.rises, missed.squares = rises.sum(1), rises.square().sum(1)
    missed.counts += 20
    (found,) = verdicts(net, missed, Prices(relative=True)).values()
    assert (rises[matters].mean(1) < 0).any()  # so that the mean alone would be wrong
    assert set(found.ranked[:32]) == set(constant.tolist())
