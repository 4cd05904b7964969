"""Schedules whose steps are late, by themselves."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch.optim import Adam

import plasticnet as pn
from plasticnet.integrations.chance import own_random, random_state, restore_random
from plasticnet.integrations.late import LateSchedule
from tests.integrations import task

pytestmark = pytest.mark.integration("what they share", 1)


def late() -> LateSchedule:
    made = LateSchedule(task.network(), task.stages(), budget=task.budget())
    made.attach(Adam(made.net.param_groups(1e-2)))
    return made


def test_steps_are_late_and_once() -> None:
    """The step of an epoch is taken once, when the next one begins, also where the loop began before the schedule."""
    made = late()
    assert [made.advance(epoch) is None for epoch in (3, 3, 4, 4, 5)] == [True, True, False, True, False]
    assert made.schedule.epoch == 2
    for epoch in range(6, 20):
        made.advance(epoch)
    assert made.schedule.epoch == made.schedule.epochs


def test_missed_epochs() -> None:
    """A schedule that was left out for some epochs says so, and stays as it is."""
    made = late()
    made.advance(0)
    with pytest.raises(pn.PlasticError, match="3 epochs are over, and the schedule has ended 0"):
        made.advance(3)
    assert made.schedule.epoch == 0


def test_a_loop_that_counts_anew() -> None:
    """Another loop with the same schedule counts its epochs from 0, and every one of them has its step."""
    made = late()
    for epoch in (3, 4, 5, 6):
        made.advance(epoch)
    assert made.schedule.epoch == 3
    made.attach(made.schedule.optimizers)  # as a second fit does
    assert [made.advance(epoch) is None for epoch in (0, 1, 2)] == [True, False, False]
    assert made.schedule.epoch == 5


def test_warnings() -> None:
    """A loop that is too short is announced when it begins, or else when it ends before the network has hardened."""
    made = late()
    made.advance(2)
    made.announce(12)  # ten epochs, as many as the stages have
    with pytest.warns(UserWarning, match="ends after 9 of the 10 epochs") as found:
        made.announce(11)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.announce(11)
        made.finish(3)
    made.attach(made.schedule.optimizers)
    with pytest.warns(UserWarning, match="ended after 2 of the 10 epochs.*at k=7 and has not hardened"):
        made.finish(4)
    made.attach(made.schedule.optimizers)
    for epoch in range(4, 10):
        made.advance(epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.finish(10)  # it has hardened, and only the last stage is shorter
    assert made.schedule.epoch == 8


def test_shares_are_those_of_the_whole_network() -> None:
    """A schedule that is built before a smaller network is loaded keeps to the shares of the whole one."""
    first = late()
    first.advance(0)
    first.net.resize({"0": list(range(9)), "2": list(range(9))})
    first.attach(Adam(first.net.param_groups(1e-2)))
    state, weights = first.state_dict(), first.net.state_dict()
    second = LateSchedule(task.network(), task.stages(), budget=task.budget())
    second.load_state_dict(state)
    second.net.load_state_dict(weights)
    second.attach(Adam(second.net.param_groups(1e-2)))
    assert second.schedule.force.targets == {"parameters": pytest.approx(task.most())}
    with pytest.raises(pn.PlasticError, match="lacks some of schedule"):
        second.load_state_dict({"epoch": 3})
    with pytest.raises(pn.PlasticError, match="there is no optimizer"):
        second.attach([])


def test_random_numbers() -> None:
    """Random numbers are restored, and a step that draws its own leaves them alone."""
    state = random_state()
    first = (torch.rand(3).tolist(), random.random(), float(np.random.rand()))
    restore_random(state)
    with own_random(torch.device("cpu"), 5):
        inner = torch.rand(3)
    assert (torch.rand(3).tolist(), random.random(), float(np.random.rand())) == first
    with own_random(torch.device("cpu"), 5):
        assert torch.equal(torch.rand(3), inner)
