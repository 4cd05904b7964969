"""Does the two jobs of the demo on handwritten digits: makes a trained network smaller, and lets another one grow.

The settings were chosen on validation data. The test data are read to say how good the networks are, and decide
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet.apps.data import Data
from plasticnet.apps.models import MLP, START
from plasticnet.apps.scores import evaluate
from plasticnet.budgets.budget import Budget
from plasticnet.growing.growth import Growth
from plasticnet.growing.narrow import narrow
from plasticnet.learning.pressure import Pressure
from plasticnet.net import PlasticNet
from plasticnet.shrinking.report import Report
from plasticnet.shrinking.shrink import shrink
from plasticnet.training.schedule import Schedule
from plasticnet.training.stages import Stage

WIDE = (256, 128)  # the hidden units of the network that is made smaller
SHARE = 0.1  # of the multiply-adds, which may stay
PRICE = 0.05  # what a parameter must add to the log-likelihood of all training digits together, in nats
BATCH, RATE, GATE_RATE = 32, 3e-3, 0.1
FIRST, LONGEST = 2, 60  # epochs before the network may grow, and in which it may
K = 7.0
EPOCHS, LOW_RATE = 30, 1e-3  # of ordinary training


@dataclass(frozen=True)
class Shrunk:
    """A trained network, and what is left of it after the cut and the repair.

    Attributes:
        whole: The trained network.
        small: The small one.
        report: What was done; its errors are the shares of the test digits that were answered wrongly.
    """

    whole: nn.Module
    small: nn.Module
    report: Report

    @property
    def accuracies(self) -> tuple[float, ...]:
        """The shares of right answers of the whole network, after the cut, and after the repair."""
        return tuple(1 - step.error for step in self.report.steps)


@dataclass(frozen=True)
class Grown:
    """A network that has grown.

    Attributes:
        network: The network, as a plain module.
        widths: The hidden units of both layers at the start and after every epoch until growth had stopped.
        parameters: The parameters at the same times.
        accuracy: The share of right answers on the test digits, after the network was trained on.
        macs: The multiply-adds for one digit.
    """

    network: nn.Module
    widths: tuple[tuple[int, ...], ...]
    parameters: tuple[int, ...]
    accuracy: float
    macs: float

    @property
    def peak(self) -> float:
        """The greatest number of parameters on the way, over that of the end."""
        return max(self.parameters) / self.parameters[-1]


def shrunk(data: Data) -> Shrunk:
    """Train a wide network, and cut it to a tenth of its multiply-adds at once, without training it again."""
    whole = MLP([data.train.x[0].numel(), *WIDE, data.outputs])
    _train(whole, data)

    def wrong(network: nn.Module) -> float:
        return 1 - evaluate(network, data.test).score

    inputs = data.train.x[torch.randperm(len(data.train))].split(128)
    small, report = shrink(whole, inputs, Budget(macs=SHARE), validate=wrong)
    return Shrunk(whole, small, report)


def grown(data: Data) -> Grown:
    """Let a network grow from three units in each hidden layer for as long as its newest units pay, and train it on."""
    model = MLP([data.train.x[0].numel(), *WIDE, data.outputs])
    net = PlasticNet(model, (data.train.x[:2],))
    narrow(net, START)
    optimizer = torch.optim.Adam(net.param_groups(RATE, GATE_RATE))
    growth, pressure = Growth(), Pressure(PRICE / len(data.train), "parameters")
    schedule = Schedule(net, optimizer, [Stage(FIRST), Stage(LONGEST, K)], growth=growth, pressure=pressure)
    widths, parameters = list[tuple[int, ...]](), list[int]()

    def note() -> None:
        widths.append(tuple(len(site) for site in net.sites.values()))
        parameters.append(net.summary().parameters)

    def step(x: Tensor, y: Tensor) -> None:
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        optimizer.zero_grad()
        (loss + schedule.penalty() if schedule.stage.plastic else loss).backward()
        optimizer.step()

    note()
    while not growth.stopped:  # at the latest in the middle of the plastic stage
        net.train()
        _epoch(data, step)
        schedule.step()
        note()
    network = net.compact()
    _train(network, data)
    score = evaluate(network, data.test).score
    return Grown(network, tuple(widths), tuple(parameters), score, net.summary().macs)


def _train(model: nn.Module, data: Data) -> None:
    """Train a plain model as is usual."""
    optimizer = torch.optim.Adam(model.parameters(), LOW_RATE)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    model.train()
    for _ in range(EPOCHS):
        _epoch(data, step)


def _epoch(data: Data, step: Callable[[Tensor, Tensor], None]) -> None:
    """Take a step for each batch of the shuffled training data."""
    for index in torch.randperm(len(data.train)).split(BATCH):
        step(data.train.x[index], data.train.y[index])
