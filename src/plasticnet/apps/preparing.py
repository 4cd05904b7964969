"""Prepares a run: builds its network, its optimizer and its schedule from its settings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from plasticnet.apps.data import Data
from plasticnet.apps.settings import Config, Mode
from plasticnet.growing.growth import Growth
from plasticnet.growing.narrow import narrow
from plasticnet.learning.pressure import Pressure
from plasticnet.net import PlasticNet
from plasticnet.training.schedule import Schedule


class Training(NamedTuple):
    """What is trained, and what trains it.

    Attributes:
        net: The network.
        optimizer: Its optimizer.
        schedule: Its schedule.
    """

    net: PlasticNet
    optimizer: torch.optim.Optimizer
    schedule: Schedule


def prepare_run(model: nn.Module, data: Data, config: Config, mode: Mode, *, limited: bool = True) -> Training:
    """Build the network, its optimizer and its schedule for a run.

    Args:
        model: The model, which is gated in place, on the device of the data. A network that grows starts narrow.
        data: The data.
        config: The settings.
        mode: What the run does.
        limited: Whether a network that grows keeps to the widths of the model.

    Raises:
        PlasticError: The settings, the model and the data do not fit together.
    """
    model.to(data.train.x.device)
    net = PlasticNet(model, (data.train.x[:2],), estimator=config.estimator, gates=config.gates, inputs=config.inputs)
    budget = None if config.budget is None or mode == "dense" else config.budget.absolute(net)
    if mode == "grow":
        for name, site in net.sites.items() if limited else ():
            net.limit(name, maximum=len(site))
        narrow(net, config.start)
    optimizer = torch.optim.Adam(net.param_groups(config.lr, config.gate_lr, weight_decay=config.weight_decay))
    growth = Growth() if mode == "grow" else None
    pressure = Pressure(config.price / len(data.train), config.cost) if budget is None else None
    schedule = Schedule(net, optimizer, config.stages(mode), growth=growth, pressure=pressure, budget=budget)
    return Training(net, optimizer, schedule)
