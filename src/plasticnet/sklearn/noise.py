"""Finds out by rows that are held out whether noise is added to the inputs while a network trains."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

from plasticnet.sklearn.fitting import Rows, Training, one_epoch, outputs, perceptron, plain_step

# The standard deviation of the noise, as a multiple of those of the columns.
AMOUNT = 0.25
# Fewer rows say nothing about noise.
FEWEST = 200
# The networks that are tried have so many units in each hidden layer, and are trained for about so many epochs, or
# steps where these are fewer.
WIDTH, EPOCHS, STEPS = 32, 30, 1000
# A fifth of the rows is held out, and then other fifths, until so many rows were.
FOLDS, ENOUGH = 5, 1000


def chosen_noise(rows: Rows, how: Training, activation: str, layers: int, out: int, order: torch.Generator) -> float:
    """Return the noise under which a small network does better on rows that it was not trained on: none, or some.

    Noise on the inputs keeps a network from learning its rows by heart, and acts like a penalty on steep functions
    (Bishop, Training with noise is equivalent to Tikhonov regularization, 1995).

    Args:
        rows: The rows to train on, whose columns are normalised.
        how: How the network is trained; its noise does not count.
        activation: The name of what follows each hidden layer.
        layers: The number of hidden layers.
        out: The number of outputs.
        order: Draws which rows are held out, and the order of the others.

    Returns:
        0, or `AMOUNT`.
    """
    if len(rows) < FEWEST:
        return 0.0
    folds = torch.arange(len(rows)) % FOLDS
    folds = folds[torch.randperm(len(rows), generator=order)]
    widths = [rows.x.shape[1], *[WIDTH] * layers, out]
    state, gained = torch.get_rng_state(), 0.0
    for fold in range(min(FOLDS, math.ceil(ENOUGH * FOLDS / len(rows)))):
        parts = rows.take(folds != fold), rows.take(folds == fold)
        for noise, sign in ((0.0, 1.0), (AMOUNT, -1.0)):
            torch.set_rng_state(state)  # the same first weights each time
            gained += sign * _loss_after(replace(how, noise=noise), widths, activation, *parts, order)
    return AMOUNT if gained > 0 else 0.0


def _loss_after(
    how: Training, widths: list[int], activation: str, rows: Rows, held_out: Rows, order: torch.Generator
) -> float:
    """Train a network in the ordinary way, and return its weighted loss on the rows that are held out."""
    net = perceptron(widths, activation, rows.x.dtype)
    optimizer = torch.optim.Adam(net.parameters(), how.rate)
    epochs = max(2, min(EPOCHS, STEPS // math.ceil(len(rows) / how.batch)))
    for left in range(epochs, 0, -1):
        optimizer.param_groups[0]["lr"] = how.rate * left / epochs
        one_epoch(net, partial(plain_step, optimizer), rows, how, order)
    return float((how.losses(outputs(net, held_out.x), held_out.y) * held_out.weight).sum())
