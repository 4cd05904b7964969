"""An expected loss within an expected loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from plasticnet import PlasticError, PlasticNet
from tests.kit.networks import mlp


@pytest.mark.parametrize("k", [0.0, 7.0, math.inf])
@pytest.mark.parametrize("each", [True, False], ids=["losses", "mean"])
def test_of_the_same_network(k: float, each: bool) -> None:
    """It is refused at every k, with the way out, and the network can be used afterwards."""
    net, x = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),)), torch.randn(6, 4)
    net.k = k

    def losses() -> Tensor:
        found = net(x).square().mean(1)
        return found if each else found.mean()

    with pytest.raises(PlasticError, match=r"call net\(x\) there.*expected=True"):
        net.expected_loss(lambda: net.expected_loss(losses))
    net.expected_loss(losses).backward()
    assert all(p.grad is not None for p in net.model.parameters())


def test_of_two_networks() -> None:
    """Networks whose outputs meet in one loss take the expected losses of both, one within the other."""
    a, b = (PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),)) for _ in range(2))
    x = torch.randn(6, 4)
    a.k = b.k = 7.0
    with torch.no_grad():
        for net in (a, b):
            for site in net.sites.values():
                site.phi.uniform_(-0.1, 0.1)
    a.expected_loss(lambda: b.expected_loss(lambda: (a(x) - b(x)).square().mean(1))).backward()
    for net in (a, b):
        assert all(bool(site.phi.grad.any()) for site in net.sites.values() if site.phi.grad is not None)
        assert all(site.phi.grad is not None for site in net.sites.values())
