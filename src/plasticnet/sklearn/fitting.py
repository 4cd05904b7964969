"""Trains a multilayer perceptron that chooses its own widths, from arrays in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from plasticnet.growing.growth import STEPS, Growth
from plasticnet.growing.rule import LATE
from plasticnet.learning.pressure import Pressure
from plasticnet.net import PlasticNet
from plasticnet.training.schedule import Schedule
from plasticnet.training.stages import Stage

# A hidden layer begins with so many units.
START = 3
# Widths are chosen in this share of the epochs, or for so many steps where it has fewer, but in no more than the second
# share. The other epochs train at the widths that were found, with a learning rate that falls to 0.
PLASTIC, PLASTIC_STEPS, MOST_PLASTIC = 0.25, 600, 0.8
# While widths are chosen, weights learn at this share of the learning rate.
SLOWER = 0.3
K, GATE_RATE = 7.0, 0.1
# A batch has between these numbers of rows, and a small epoch about so many batches.
SMALLEST, LARGEST, BATCHES = 64, 256, 32

# If nobody says, there are so many epochs; more where these have fewer batches than the first number of batches, and
# fewer, but not below the second number of epochs, where they have more than the second one.
EPOCHS, FEWEST_EPOCHS, FEWEST_BATCHES, MOST_BATCHES = 100, 30, 1000, 5000

# It returns the losses of rows from outputs and targets, shape (rows,).
Losses = Callable[[Tensor, Tensor], Tensor]
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Rows:
    """Inputs, targets and weights of some rows.

    Attributes:
        x: Shape (rows, features).
        y: Shape (rows,) or (rows, outputs).
        weight: What each row counts, shape (rows,).
    """

    x: Tensor
    y: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> Rows:
        """Return some of the rows, by their numbers."""
        return Rows(self.x[rows], self.y[rows], self.weight[rows])


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        losses: The losses of rows.
        price: What a parameter costs in the loss, as a multiple of one over the weight of all rows.
        rate: The learning rate at the widths that were found, before it falls.
        batch: How many rows a batch has.
        epochs: How many epochs there are.
        noise: The standard deviation of the noise that is added to the inputs.
    """

    losses: Losses
    price: float
    rate: float
    batch: int
    epochs: int
    noise: float = 0.0

    def stages(self, rows: int) -> list[Stage]:
        """Return the plastic epochs and those at the widths that were found; only the latter where there are too few.

        Args:
            rows: How many rows an epoch has.
        """
        steps = number_of_batches(rows, self.batch)
        plastic = max(PLASTIC * self.epochs, PLASTIC_STEPS / steps)
        plastic = min(math.ceil(min(plastic, MOST_PLASTIC * self.epochs)), self.epochs - 1)
        # Growth has the first half of the plastic epochs, and judges units after so many steps.
        enough = int(LATE * plastic) * steps > STEPS
        return [Stage(plastic, K), Stage(self.epochs - plastic)] if enough else [Stage(self.epochs)]

    @property
    def plastic_rate(self) -> float:
        """The learning rate of the weights while widths are chosen."""
        return SLOWER * self.rate


def batch_size(rows: int) -> int:
    """Return how many rows a batch has if nobody says."""
    return min(max(rows // BATCHES, SMALLEST), LARGEST)


def number_of_batches(rows: int, batch: int) -> int:
    """Return how many batches so many rows are, one at least."""
    return math.ceil(max(rows, 1) / batch)


def number_of_epochs(rows: int, batch: int) -> int:
    """Return how many epochs there are if nobody says.

    Args:
        rows: How many rows an epoch has.
        batch: How many rows a batch has.
    """
    batches = number_of_batches(rows, batch)
    return max(FEWEST_EPOCHS, min(max(EPOCHS, FEWEST_BATCHES // batches), MOST_BATCHES // batches))


def perceptron(widths: list[int], activation: str, dtype: torch.dtype) -> nn.Sequential:
    """Return a multilayer perceptron.

    Args:
        widths: The numbers of features, from the input to the output.
        activation: The name of what follows each hidden layer.
        dtype: The floating type of its parameters.
    """
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out, dtype=dtype), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class Fit:
    """One training of a network, which goes epoch by epoch.

    Where a batch holds all rows, the whole batch shares its gates, so that a row of weight 2 is, but for rounding, the
    same as two rows.

    Args:
        model: The network that is trained, in place. It has at least one hidden layer.
        rows: The rows to train on.
        how: How it is trained.

    Attributes:
        net: The network under its gates.
        schedule: What moves it from epoch to epoch.
    """

    def __init__(self, model: nn.Module, rows: Rows, how: Training) -> None:
        self.rows, self.how = rows, how
        whole = len(rows) <= how.batch
        self.net = PlasticNet(model, (rows.x[:2],), gates="batch" if whole else "auto")
        self.optimizer = torch.optim.Adam(self.net.param_groups(how.plastic_rate, GATE_RATE))
        pressure = Pressure(how.price / max(float(rows.weight.sum()), 1.0), cost="parameters")
        stages = how.stages(len(rows))
        growth = Growth() if stages[0].plastic else None
        self.schedule = Schedule(self.net, self.optimizer, stages, pressure=pressure if growth else None, growth=growth)

    def epochs(self, order: torch.Generator) -> Iterator[float]:
        """Train to the end of the schedule, and yield the mean loss of each epoch.

        Args:
            order: Draws the order of the rows.
        """
        settled = self.schedule.stages[-1].epochs
        while self.schedule.epoch < self.schedule.epochs:
            left = self.schedule.epochs - self.schedule.epoch
            rate = self.how.plastic_rate if left > settled else self.how.rate * left / settled
            self.optimizer.param_groups[0]["lr"] = rate
            yield one_epoch(self.net, self._step, self.rows, self.how, order)
            self.schedule.step()

    def _step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Take a training step on the losses that a function returns, and return their mean."""
        loss = self.net.expected_loss(closure)
        self.optimizer.zero_grad()
        (loss + self.schedule.penalty()).backward()
        self.optimizer.step()
        return loss.detach()


def plain_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> Tensor:
    """Take an ordinary training step on the losses that a function returns, and return their mean."""
    loss = closure().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def one_epoch(
    network: nn.Module,
    step: Callable[[Callable[[], Tensor]], Tensor],
    rows: Rows,
    how: Training,
    order: torch.Generator,
) -> float:
    """Train for an epoch, and return its mean loss; NaN where no row has a weight.

    Args:
        network: The network.
        step: Takes a training step on the losses that a function returns, and returns their mean.
        rows: The rows to train on.
        how: How the network is trained.
        order: Draws the order of the rows, and noise.
    """
    network.train()
    total = weighed = 0.0
    for chosen in torch.randperm(len(rows), generator=order).split(how.batch):
        batch = rows.take(chosen)
        if how.noise:
            drawn = torch.randn(batch.x.shape, generator=order, dtype=batch.x.dtype)
            batch = replace(batch, x=batch.x + how.noise * drawn)
        weight = float(batch.weight.sum())
        if weight > 0:
            share = batch.weight * (len(batch) / weight)

            def closure(batch: Rows = batch, share: Tensor = share) -> Tensor:
                losses = how.losses(network(batch.x), batch.y) * share
                # Gates that the whole batch shares take its mean.
                return losses.mean() if len(rows) <= how.batch else losses

            total += float(step(closure)) * weight
            weighed += weight
    return total / weighed if weighed else math.nan


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of a network for inputs of shape (rows, features), a few thousand rows at a time."""
    return torch.cat([model.eval()(part) for part in x.split(4096)])
