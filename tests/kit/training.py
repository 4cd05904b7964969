"""A short training loop, as a user writes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from plasticnet import PlasticNet, Schedule


def train_epoch(
    net: PlasticNet, optimizer: Optimizer, schedule: Schedule, x: Tensor, y: Tensor, *, batch: int = 8
) -> None:
    """One epoch over shuffled batches; the schedule does not end it."""
    net.train()
    for i in torch.randperm(len(x)).split(batch):
        loss = net.expected_loss(lambda i=i: F.cross_entropy(net(x[i]), y[i], reduction="none"))
        optimizer.zero_grad()
        (loss + schedule.penalty()).backward()
        optimizer.step()


def xor(n: int = 256) -> tuple[Tensor, Tensor]:
    """A task that one unit cannot solve: the sign of a product."""
    x = torch.randn(n, 4)
    return x, ((x[:, 0] * x[:, 1] > 0) ^ (x[:, 2] > 0)).long()


def quadrants(n: int = 256) -> tuple[Tensor, Tensor]:
    """A task that is learned at once: the signs of two numbers."""
    x = torch.randn(n, 4)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
