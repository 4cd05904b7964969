"""`compact` keeps the multiples of widths that a schedule or `prune` has kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plasticnet as pn

X = torch.linspace(-1, 1, 8 * 3 * 64).reshape(8, 3, 8, 8)


def build() -> pn.PlasticNet:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()
    return pn.PlasticNet(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3)), (X,))


def close(net: pn.PlasticNet, first: int, second: int) -> None:
    with torch.no_grad():
        for name, n in (("0", first), ("3", second)):
            net.sites[name].phi[:n] = -1.0


def widths(module: nn.Module) -> list[int]:
    return [m.out_channels for m in module.modules() if isinstance(m, nn.Conv2d)]


def test_a_schedule_sets_the_multiple() -> None:
    net = build()
    assert net.multiple_of == 1
    optimizer = torch.optim.Adam(net.param_groups(1e-2))
    stages = [pn.Stage(1, k=7.0), pn.Stage(1)]
    schedule = pn.Schedule(net, optimizer, stages, multiple_of=8)
    close(net, 5, 7)  # 11 and 17 stay open
    schedule.step()
    assert widths(net.model) == [16, 24]
    assert widths(net.compact()) == [16, 24]
    assert widths(net.compact(multiple_of=1)) == [11, 17]
    torch.testing.assert_close(net.compact()(X), net.eval()(X))
    fresh = build()
    fresh.load_state_dict(net.state_dict())
    assert widths(fresh.compact()) == [11, 17]  # the state of the network does not hold it
    pn.Schedule(fresh, torch.optim.Adam(fresh.param_groups(1e-2)), stages, multiple_of=8).load_state_dict(
        schedule.state_dict()
    )
    assert widths(fresh.compact()) == [16, 24]


def test_prune_sets_the_multiple() -> None:
    net = build()
    close(net, 5, 7)
    net.prune(multiple_of=8)
    assert net.multiple_of == 8
    assert widths(net.model) == widths(net.compact()) == [16, 24]
    net.prune()
    assert net.multiple_of == 1
    assert widths(net.model) == widths(net.compact()) == [11, 17]


def test_a_multiple_that_is_none_changes_nothing() -> None:
    net = build()
    net.prune(multiple_of=4)
    for wrong in (0, 2.0, True):
        with pytest.raises(pn.PlasticError, match="multiple_of"):
            net.prune(multiple_of=wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(pn.PlasticError, match="multiple_of"):
            net.compact(multiple_of=wrong)  # pyright: ignore[reportArgumentType]
    assert net.multiple_of == 4
