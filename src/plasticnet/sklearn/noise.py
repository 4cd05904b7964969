"""Finds out by rows that are held out how much noise is added to the inputs while a network trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plasticnet.sklearn.fitting import ACTIVATIONS, Rows, Training, perceptron

# Standard deviations of the noise, as multiples of those of the columns; more must lower the loss by such a share.
AMOUNTS, BETTER = (0.0, 0.25, 0.5), 0.02
# Fewer rows say nothing about noise.
FEWEST = 200
# The networks that are tried have so many units in each hidden layer, and are trained for about so many epochs, or
# steps where these are fewer.
WIDTH, EPOCHS, STEPS = 32, 30, 1000
# A fifth of the rows is held out, and then other fifths, until so many rows were.
FOLDS, ENOUGH = 5, 1000


def chosen_noise(rows: Rows, how: Training, activation: str, layers: int, out: int, order: torch.Generator) -> float:
    """Return the noise under which a small network does best on rows that it was not trained on.

    Noise on the inputs keeps a network from learning its rows by heart, and acts like a penalty on steep functions
    (Bishop, Training with noise is equivalent to Tikhonov regularization, 1995).

    Args:
        rows: The rows to train on, whose columns are normalised.
        how: How the network is trained; its noise does not count.
        activation: The name of what follows each hidden layer.
        layers: The number of hidden layers.
        out: The number of outputs.
        order: Draws which rows are held out, the order of the others, and noise.

    Returns:
        One of `AMOUNTS`.
    """
    if len(rows) < FEWEST:
        return 0.0
    part, folds = len(rows) // FOLDS, min(FOLDS, math.ceil(ENOUGH * FOLDS / len(rows)))
    shuffled = torch.randperm(len(rows), generator=order)
    starts = [fold * part for fold in range(folds) for _ in AMOUNTS]
    held_out = torch.stack([shuffled[i : i + part] for i in starts])
    rest = torch.stack([torch.cat([shuffled[:i], shuffled[i + part :]]) for i in starts])
    widths = [rows.x.shape[1], *[WIDTH] * layers, out]
    alike = _Alike(perceptron(widths, activation, rows.x.dtype), len(starts), activation)
    _train(alike, rows, rest, torch.tensor(AMOUNTS * folds, dtype=rows.x.dtype), how, order)
    with torch.no_grad():
        losses = alike.losses(rows.take(held_out), how).view(folds, len(AMOUNTS)).sum(0).tolist()
    found = 0
    for i, loss in enumerate(losses):
        if loss < (1 - BETTER) * losses[found]:
            found = i
    return AMOUNTS[found]


class _Alike:
    """Perceptrons that begin alike and are trained side by side, each on rows of its own.

    Args:
        first: The first of them.
        count: How many there are.
        activation: The name of what follows each hidden layer.
    """

    def __init__(self, first: nn.Sequential, count: int, activation: str) -> None:
        layers = [m for m in first if isinstance(m, nn.Linear)]
        self.weights = [_stacked(layer.weight.mT, count) for layer in layers]
        self.biases = [_stacked(layer.bias[None], count) for layer in layers]
        self._activation = ACTIVATIONS[activation]()

    def losses(self, rows: Rows, how: Training) -> Tensor:
        """Return the weighted mean loss of each network, shape (count,).

        Args:
            rows: The rows of each: inputs of shape (count, rows, features), and so on.
            how: What has the losses.
        """
        x = rows.x
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, self._activation(x) if i else x, weight)
        losses = how.losses(x.flatten(0, 1), rows.y.flatten(0, 1)).view(rows.weight.shape) * rows.weight
        return losses.sum(1) / rows.weight.sum(1).clamp(min=1e-12)


def _stacked(parameter: Tensor, count: int) -> Tensor:
    """Return so many copies of a parameter, stacked."""
    return parameter.detach().expand(count, *parameter.shape).clone().requires_grad_()


def _train(alike: _Alike, rows: Rows, own: Tensor, noise: Tensor, how: Training, order: torch.Generator) -> None:
    """Train networks side by side, with a learning rate that falls to 0.

    Args:
        alike: The networks.
        rows: All rows.
        own: The numbers of the rows of each network, shape (networks, rows).
        noise: The noise on the inputs of each, shape (networks,).
        how: How they are trained.
        order: Draws the order of the rows, and noise.
    """
    optimizer = torch.optim.Adam([*alike.weights, *alike.biases], how.rate)
    epochs = max(2, min(EPOCHS, STEPS // math.ceil(own.shape[1] / how.batch)))
    for left in range(epochs, 0, -1):
        optimizer.param_groups[0]["lr"] = how.rate * left / epochs
        for chosen in torch.randperm(own.shape[1], generator=order).split(how.batch):
            batch = rows.take(own[:, chosen])
            drawn = torch.randn(batch.x.shape, generator=order, dtype=batch.x.dtype)
            noisy = Rows(batch.x + noise[:, None, None] * drawn, batch.y, batch.weight)
            optimizer.zero_grad()
            alike.losses(noisy, how).sum().backward()
            optimizer.step()
