"""A plastic stage that could not teach the gates anything says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from plasticnet import PlasticNet, Schedule, Stage
from tests.kit.networks import mlp


def network() -> PlasticNet:
    return PlasticNet(mlp(4, 8, 3), (torch.randn(2, 4),))


def run(
    net: PlasticNet, optimizer: Optimizer, stages: list[Stage], loss: Callable[[PlasticNet], Tensor] | None = None
) -> None:
    """Train by a schedule, with a scaler that skips a step where a gradient is not finite."""
    x = torch.randn(16, 4)
    schedule = Schedule(net, optimizer, stages)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for _ in range(schedule.epochs):
        net.train()
        for _ in range(2):
            optimizer.zero_grad()
            total = net.expected_loss(lambda: net(x).square().sum(1)) if loss is None else loss(net)
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
        schedule.step()


PLASTIC = [Stage(1), Stage(2, k=7.0), Stage(1)]


def test_a_rate_of_zero_is_told() -> None:
    net = network()
    with pytest.warns(UserWarning, match=r"no gate has moved.*param_groups.*GradScaler.*gate_lr") as caught:
        run(net, Adam(net.param_groups(1e-2, gate_lr=0.0)), PLASTIC)
    assert len(caught) == 1  # at the end of the stage, not of every epoch
    assert caught[0].filename == __file__


def test_skipped_steps_are_told() -> None:
    net = network()
    x = torch.randn(16, 4)

    def infinite(net: PlasticNet) -> Tensor:
        loss = net.expected_loss(lambda: net(x).square().sum(1))
        return loss + 0 * net.phi().sum() * torch.inf if net.k == 7.0 else loss

    with pytest.warns(UserWarning, match="no gate has moved"):
        run(net, Adam(net.param_groups(1e-2)), PLASTIC, infinite)


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_gates_that_move_are_not_warned_of(kind: type[Optimizer]) -> None:
    net = network()
    groups = net.param_groups(1e-2)
    for group in groups if kind is SGD else ():
        group.pop("betas", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, kind(groups), PLASTIC)  # pyright: ignore[reportCallIssue]


def test_stages_that_teach_no_gates_are_not_warned_of() -> None:
    """Ordinary training, dropout, a plastic stage without steps, and one in which all gates are held open."""
    for stages, held in (([Stage(2), Stage(1, k=0.0)], 0), ([Stage(1, k=7.0)], 9)):
        net = network()
        net.sites["0"].grace.fill_(held)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(net, Adam(net.param_groups(1e-2, gate_lr=0.0)), stages)
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule(net, Adam(net.param_groups(1e-2)), [Stage(1, k=7.0)]).step()


def test_every_stage_is_looked_at_by_itself() -> None:
    net = network()
    optimizer = Adam(net.param_groups(1e-2, gate_lr=0.1))
    x = torch.randn(16, 4)
    schedule = Schedule(net, optimizer, [Stage(1, k=7.0), Stage(1, k=5.0)])
    for rate, told in ((0.1, 0), (0.0, 1)):
        optimizer.param_groups[1]["lr"] = rate
        optimizer.zero_grad()
        net.train().expected_loss(lambda: net(x).square().sum(1)).backward()
        optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule.step()
        assert len(caught) == told
