"""Schedule(repair=...): what the budget closes as the network hardens is mended on inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from plasticnet import Budget, PlasticError, PlasticNet, Schedule, Stage
from tests.kit.networks import assert_same, mlp

X = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)).double()


def hardened(repair: object, budget: Budget | None, **closed: int) -> tuple[PlasticNet, Tensor]:
    """A network that was closed in part, hardened, and what it gave before."""
    torch.manual_seed(0)
    net = PlasticNet(mlp(6, 20, 12, 3).double(), (X[:2],))
    schedule = Schedule(net, Adam(net.param_groups(lr=0.01)), [Stage(1, 7.0), Stage(1)], budget=budget, repair=repair)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, n in closed.items():
            net.sites[name.removeprefix("site")].phi[:n] = -0.1
    before = net.eval()(X[300:]).detach()
    schedule.step()
    return net, before


def far(net: PlasticNet, before: Tensor) -> float:
    return float((net.eval()(X[300:]).detach() - before).square().mean())


@pytest.mark.parametrize("budget", [Budget(units=0.5), Budget(macs=0.4)])
def test_what_the_budget_closes_is_mended(budget: Budget) -> None:
    plain, before = hardened(None, budget, site0=3)
    mended, same = hardened(X[:300].split(50), budget, site0=3)
    assert torch.equal(before, same)
    assert {n: len(s) for n, s in mended.sites.items()} == {n: len(s) for n, s in plain.sites.items()}
    assert far(mended, before) < 0.5 * far(plain, before)


def test_what_training_has_closed_needs_no_mending() -> None:
    plain, _ = hardened(None, None, site0=5, site2=2)
    mended, _ = hardened(X[:300].split(50), None, site0=5, site2=2)
    assert_same(mended.state_dict(), plain.state_dict())


def test_units_that_the_budget_adds_are_no_part_of_the_aim() -> None:
    net, before = hardened(X[:300].split(50), Budget(units=24), site0=18, site2=1)
    assert sum(len(s) for s in net.sites.values()) == 24
    assert far(net, before) < 1


def test_inputs_that_can_be_read_once_are_refused_at_once() -> None:
    with pytest.raises(PlasticError, match="once"):
        hardened(iter(X.split(50)), Budget(units=0.5))


def test_inputs_that_do_not_fit_change_nothing() -> None:
    torch.manual_seed(0)
    net = PlasticNet(mlp(6, 20, 12, 3).double(), (X[:2],))
    optimizer = Adam(net.param_groups(lr=0.01))
    schedule = Schedule(
        net, optimizer, [Stage(1, 7.0), Stage(1)], budget=Budget(units=0.5), repair=[torch.randn(50, 5).double()] * 5
    )
    before, epoch = copy.deepcopy(net.state_dict()), schedule.epoch
    with pytest.raises(PlasticError, match=r"does not run on a batch, float64\[50, 5\]"):
        schedule.step()
    assert_same(net.state_dict(), before)
    assert schedule.epoch == epoch
    schedule.repair = [torch.randn(50, 6).double()] * 5
    schedule.step()
    assert sum(len(s) for s in net.sites.values()) == 16
