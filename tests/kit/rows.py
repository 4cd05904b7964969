"""Networks with a function of rows between two layers, and what must hold of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.adversarial_checks import check_life, close_units, distance, precise


class Rows(nn.Module):
    """A layer, a function of its channels, which are the last axis, and two layers that read it."""

    def __init__(self, between: Callable[[Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.between = nn.Linear(4, 8) if first is None else first, between
        self.b, self.c = nn.LazyLinear(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.between(self.a(x))).tanh())


class Maps(Rows):
    """The same for images, whose channels are axis 1."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__(between, nn.Conv2d(3, 8, 3, padding=1))
        self.b, self.c = nn.LazyConv2d(5, 1), nn.Conv2d(5, 2, 1)


def made(network: type[Rows], between: Callable[[Tensor], Tensor], x: Tensor) -> nn.Module:
    model = network(between)
    model(x)
    return model


def check_cut_through(
    network: type[Rows], between: Callable[[Tensor], Tensor], x: Tensor, folder: Path, units: int = 8
) -> None:
    """The channels are gated, and cut, grown, saved and loaded exactly, also on inputs that tracing did not see."""
    net = check_life(lambda: made(network, between, x), (x,), folder)
    fresh = pn.PlasticNet(precise(made(network, between, x)), (x.double(),))
    assert {n: len(s) for n, s in fresh.sites.items()} == {"a": units, "b": 5}, fresh.frozen
    assert net.sites.keys() == fresh.sites.keys()
    for _ in range(3):
        close_units(fresh, 0.5)
        other = torch.randn_like(x).double()
        assert distance(fresh.eval()(other), fresh.compact()(other)) <= 1e-9


def check_frozen(network: type[Rows], between: Callable[[Tensor], Tensor], x: Tensor, reason: str) -> None:
    """The channels are frozen with this reason, and the next layer is gated all the same."""
    net = pn.PlasticNet(made(network, between, x), (x,))
    assert {n: len(s) for n, s in net.sites.items()} == {"b": 5}
    assert re.search(reason, net.frozen["a"]), net.frozen["a"]
