"""Widths that are multiples of a number, within a budget."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from plasticnet import Budget, PlasticNet, profile, shrink
from plasticnet.shrinking.multiples import close_to_multiples

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))


def network(*widths: int) -> nn.Sequential:
    """Return a network of hidden layers of these widths."""
    torch.manual_seed(0)
    sizes = (6, *widths, 3)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_what_rounding_down_leaves_of_a_budget_is_spent(share: float) -> None:
    model = network(32, 32, 32)
    small, report = shrink(model, X.split(50), Budget(macs=share), multiple_of=8)
    most = share * profile(model, (X[:1],)).macs
    assert all(s.after % 8 == 0 for s in report.sites)
    assert profile(small, (X[:1],)).macs <= most
    assert profile(small, (X[:1],)).macs > 0.6 * most


def test_a_site_that_has_lost_more_is_filled_first_and_only_within_the_target() -> None:
    torch.manual_seed(0)
    net = PlasticNet(network(32, 32), (X[:2],))
    worth = {name: torch.arange(32.0).flip(0) for name in net.sites}
    with torch.no_grad():
        net.sites["0"].phi[15:] = -1.0  # 15 units stay: 7 of them make no multiple
        net.sites["2"].phi[17:] = -1.0  # 17 units stay: 1 does not
    close_to_multiples(net, worth, 8, {"units": 32.0})
    assert [int(s.open.sum()) for s in net.sites.values()] == [16, 16]
    assert net.sites["0"].open[:16].all()  # the best ones
    close_to_multiples(net, worth, 8, {"units": 32.0})  # multiples stay as they are
    assert [int(s.open.sum()) for s in net.sites.values()] == [16, 16]


def test_a_site_with_less_than_a_multiple_keeps_what_it_has() -> None:
    net = PlasticNet(network(32, 32), (X[:2],))
    worth = {name: torch.arange(32.0) for name in net.sites}
    with torch.no_grad():
        net.sites["0"].phi[5:] = -1.0
    close_to_multiples(net, worth, 8, {"units": 64.0})
    assert [int(s.open.sum()) for s in net.sites.values()] == [5, 32]
