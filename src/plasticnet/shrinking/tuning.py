"""Trains a network that was cut for some epochs, and ends early, with what is there, when it is interrupted."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from plasticnet.errors import PlasticError
from plasticnet.shrinking.finite import NotFinite
from plasticnet.tools.batches import length_of
from plasticnet.tools.inputs import described
from plasticnet.tools.progress import Progress
from plasticnet.tools.trees import tensors_within

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
_LR, _DECAY = 1e-3, 1e-4
_WARM = 0.05  # the share of the steps in which the learning rate rises to its full size
_GRADIENT = 1.0  # the largest norm of the gradient


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained.

    Raises:
        PlasticError: There are none.
    """
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise PlasticError(
            f"epochs: no parameter of {type(model).__name__} requires a gradient, so that it cannot learn; call "
            "model.requires_grad_(True) before, or leave epochs at 0"
        )
    return found


def make_optimizer(parameters: list[nn.Parameter], making: MakeOptimizer | None) -> Optimizer:
    """Return an optimizer of some parameters.

    Args:
        parameters: The parameters.
        making: Makes the optimizer; AdamW by default.

    Raises:
        PlasticError: It makes none, or one whose step needs a closure.
    """
    if making is None:
        return AdamW(parameters, lr=_LR, weight_decay=_DECAY)
    way_out = "it gets parameters and returns an optimizer of them, as in optimizer=lambda p: torch.optim.SGD(p, 0.01)"
    try:
        found = making(parameters)
    except Exception as error:  # a function of the user's can raise anything
        raise PlasticError(f"optimizer= raises {error!r}; {way_out}") from error
    if not isinstance(found, Optimizer):
        raise PlasticError(f"optimizer= returned {described(found)}; {way_out}")
    accepted = inspect.signature(found.step).parameters.values()
    needed = [p.name for p in accepted if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise PlasticError(
            f"the step of {type(found).__name__} needs a {needed[0]}, which epochs do not give; take an optimizer that "
            "does without, such as SGD, Adam or AdamW"
        )
    return found


def tune(
    network: nn.Module,
    batches: Iterable[Any],
    losses: Callable[[Any], Tensor],
    epochs: int,
    making: MakeOptimizer | None,
) -> Iterator[float]:
    """Train a network, which is in evaluation mode between the epochs, and yield the mean loss of each.

    The learning rate rises for a moment, and then falls along a cosine to 0 (Loshchilov & Hutter, arXiv 1608.03983,
    equation 5).

    Args:
        network: The network.
        batches: The batches of an epoch.
        losses: Runs the network on a batch, and returns the losses of its samples or their mean.
        epochs: The number of epochs.
        making: Makes an optimizer for the parameters; AdamW by default.

    Raises:
        PlasticError: No parameter requires a gradient, or there is no optimizer that could train them.
        NotFinite: A loss is not finite.
    """
    parameters = trainable(network)
    optimizer = make_optimizer(parameters, making)
    rates = [group["lr"] for group in optimizer.param_groups]
    length = length_of(batches) or 0  # where it is unknown, the first epoch tells
    progress = Progress("training", max(length, 1) * epochs)
    try:
        for epoch in range(epochs):
            network.train()
            total, n = 0.0, 0
            for place, batch in enumerate(batches):
                share = (epoch + place / max(length, place + 1)) / epochs
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * min(share / _WARM + 0.01, 1.0) * (0.5 + 0.5 * math.cos(math.pi * share))
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss = _loss(losses, batch)
                    if not bool(loss.isfinite()):
                        where = f"at batch {place + 1} of epoch {epoch + 1}"
                        raise NotFinite(f"the loss is {float(loss.detach())} {where}; {_way_out(parameters, batch)}")
                    loss.backward()
                nn.utils.clip_grad_norm_(parameters, _GRADIENT)
                optimizer.step()
                total, n = total + float(loss.detach()), n + 1
                progress.advance(f"epoch {epoch + 1} of {epochs}, loss {total / n:.4g}")
            length = length or n
            progress.total = max(length * epochs, 1)
            network.eval()
            yield total / max(n, 1)
    finally:
        progress.close()
        network.eval()
        network.zero_grad(set_to_none=True)


def _loss(losses: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """Return the mean loss of a batch. Raises `PlasticError` where BatchNorm has a single value to learn from."""
    try:
        return losses(batch).mean()
    except (ValueError, PlasticError) as error:
        if "more than 1 value per channel" not in str(error):
            raise
        why = error.__cause__ if isinstance(error, PlasticError) else error
        raise PlasticError(
            f"a batch of one input is too small for BatchNorm to learn from ({why}): drop_last=True leaves out the "
            "last batch of a DataLoader where it is smaller; or make batches larger"
        ) from error


def _way_out(parameters: Iterable[nn.Parameter], batch: Any) -> str:
    """Return what helps where the loss of a batch is not finite."""
    if not all(bool(t.isfinite().all()) for t in tensors_within(batch)):
        return "the batch itself holds NaN or infinite numbers: leave such inputs out"
    if any(p.dtype == torch.float16 for p in parameters):
        return "float16 is too coarse for most optimizers: shrink model.float(), and call .half() on what it returns"
    return "a lower learning rate may help"
