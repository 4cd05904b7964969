"""Turns a training step that knows nothing of gates into an expected loss with the penalty of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.site import probabilities, transition
from plasticnet.training.schedule import Schedule

# Under this name a step may return the losses of the samples beside their mean.
LOSSES = "losses"


def training_loss(
    schedule: Schedule, losses: Callable[[], Tensor], *, expected: bool = False, batches: float = 1
) -> Tensor:
    """Return what one training step is to minimise: the expected loss and the penalty of the schedule.

    Args:
        schedule: The schedule of the network.
        losses: A function that runs the network and returns the losses of the samples, shape (batch,), or their mean.
        expected: Whether that mean is an expected loss already, so that only the penalty is missing.
        batches: By what the loop has divided the losses, and will not divide what is returned. Where gradients are
            accumulated, that may be the number of batches. The penalty is then divided by it, too.

    Raises:
        PlasticError: As `PlasticNet.expected_loss` raises it, or ``expected`` is true and the network's gates were not
            asked for an expected loss.
    """
    net = schedule.net
    if not expected:
        loss = net.expected_loss(losses if batches == 1 else lambda: losses() * batches)
        return (loss + schedule.penalty()) / batches
    before = net.sampler.estimates
    loss = losses()
    learns = schedule.stage.plastic and torch.is_grad_enabled() and net.sampler.estimates == before
    if loss.dim() or (learns and transition(probabilities(net.all_gates(), net.k).detach()) > 0):
        raise PlasticError(
            "the training step was to take the expected loss itself, and has not called net.expected_loss, so that no "
            "gate would learn. Call it there, or let the callback do it: leave out expected=True"
        )
    return loss + schedule.penalty() / batches


def losses_within(output: Any) -> Tensor:
    """Return the losses in what a training step has returned.

    Args:
        output: A tensor of shape (batch,) or a scalar; or a mapping with such a tensor under "losses" or "loss". Where
            it has both, "losses" are those of the samples.

    Raises:
        PlasticError: It is something else, or "loss" is another number than the mean of "losses".
    """
    if isinstance(output, Tensor):
        return output
    if not isinstance(output, Mapping) or not isinstance(output.get(LOSSES, output.get("loss")), Tensor):
        what = f"a mapping with {', '.join(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
        raise PlasticError(
            f"the training step returned {what}: it must return its loss, a tensor, or a mapping with it under 'loss', "
            f"or with the losses of the samples, shape (batch,), under '{LOSSES}'"
        )
    found, mean = output.get(LOSSES), output.get("loss")
    if found is None:
        return output["loss"]
    if isinstance(mean, Tensor):
        given, of_samples = mean.detach().float(), found.detach().float().mean()
        if not torch.allclose(given, of_samples, rtol=1e-2, atol=1e-6, equal_nan=True):
            raise PlasticError(
                f"the training step returned a 'loss' of {float(given):.5g}, which is not the mean of its '{LOSSES}', "
                f"{float(of_samples):.5g}. The latter is trained: add to the losses what else the loss has, or return "
                f"no '{LOSSES}'"
            )
    return found


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return what a training step has returned, with another loss in the place of its own."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss
