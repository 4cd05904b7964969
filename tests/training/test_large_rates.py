"""Learning rates that are far too large: a training ends with finite numbers and units in every site, or says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import plasticnet as pn

FORCES: dict[str, Callable[[], dict[str, Any]]] = {
    "budget": lambda: {"budget": pn.Budget(units=0.5)},
    "budget of loss": lambda: {"budget": pn.Budget(loss=0.1)},
    "price": lambda: {"pressure": pn.Pressure(1e-3)},
    "growth": lambda: {"growth": pn.Growth(), "pressure": pn.Pressure(1e-3)},
}


@pytest.mark.filterwarnings("ignore:growth has ended before it began", "ignore:no gate has moved")
@pytest.mark.parametrize("force", FORCES)
@pytest.mark.parametrize(
    ("make", "rate", "ends"),
    [
        (lambda groups: SGD(groups, momentum=0.9), 100.0, True),
        (lambda groups: SGD(groups, momentum=0.9), 1e8, False),
        (Adam, 1e4, True),
        (Adam, 1e20, False),
    ],
)
def test_it_ends_sound_or_says_why(make: Callable[[Any], Optimizer], rate: float, ends: bool, force: str) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU()]
    model, x = nn.Sequential(*layers, nn.Linear(12, 3)), torch.randn(96, 8)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    net = pn.PlasticNet(model, (x[:2],))
    optimizer = make(net.param_groups(rate))
    schedule = pn.Schedule(net, optimizer, [pn.Stage(1), pn.Stage(4, k=7.0), pn.Stage(1)], **FORCES[force]())

    def train() -> None:
        while schedule.epoch < schedule.epochs:
            net.train()
            for i in torch.randperm(96).split(16):
                loss = net.expected_loss(lambda i=i: F.cross_entropy(net(x[i]), y[i], reduction="none"))
                optimizer.zero_grad()
                (loss + schedule.penalty()).backward()
                optimizer.step()
            schedule.step(1.0)

    if not ends:
        with pytest.raises(pn.PlasticError, match=r"not finite.*learning rate"):
            train()
        return
    train()
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert all(bool(site.open.any()) for site in net.sites.values())
    out = net.eval()(x)
    assert out.isfinite().all()
    torch.testing.assert_close(net.compact()(x), out)
