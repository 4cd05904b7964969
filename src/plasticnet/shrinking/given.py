"""Checks what `shrink` is given: its options, and a loss of the user's, which is called once before the work begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.shrinking.finite import NotFinite
from plasticnet.shrinking.tuning import MakeOptimizer
from plasticnet.surgery.survivors import check_multiple
from plasticnet.tools.batches import Forward, like_model, run_batch
from plasticnet.tools.inputs import described
from plasticnet.tools.reals import as_float
from plasticnet.tools.snapshot import left_as_it_was

Loss = Callable[[Any, Any], Tensor]


_FUNCTIONS = {
    "loss": "loss=lambda output, batch: F.cross_entropy(output, batch[1])",
    "validate": "validate=lambda network: error_on_my_data(network)",
    "forward": "forward=lambda model, batch: model(batch[0])",
    "outputs": 'outputs=lambda output: output["logits"]',
}


def check_options(
    model: nn.Module,
    budget: Budget,
    epochs: int,
    calibrate: int,
    multiple_of: int,
    optimizer: MakeOptimizer | None,
    **functions: Any,
) -> None:
    """Raise `PlasticError` where an option of `shrink` is out of range.

    The arguments are options of `shrink`, of the same names; ``functions`` are those that it calls, or None.
    """
    if torch.is_inference_mode_enabled():
        raise PlasticError("shrink takes gradients, which torch.inference_mode() forbids: call it outside of that")
    if not isinstance(model, nn.Module) or isinstance(model, PlasticNet):
        raise PlasticError(f"shrink takes a plain trained module, not a {type(model).__name__}")
    if not isinstance(budget, Budget):
        given = repr(budget) if isinstance(budget, int | float | str) else f"a {type(budget).__name__}"
        raise PlasticError(
            f"budget is {given}: say what the small network may cost, as in pn.Budget(macs=0.5), and give the "
            "arguments in this order: shrink(model, batches, budget)"
        )
    if type(epochs) is not int or epochs < 0:
        raise PlasticError(f"epochs={epochs!r}: a whole number, 0 or more")
    if type(calibrate) is not int or calibrate < 10:
        raise PlasticError(f"calibrate={calibrate!r}: a whole number of inputs, 10 or more")
    for name, given in functions.items():
        if given is not None and not callable(given):
            raise PlasticError(f"{name}={given!r} is not a function, such as {_FUNCTIONS[name]}")
    if optimizer is not None and not callable(optimizer):
        raise PlasticError(
            f"optimizer={type(optimizer).__name__}(...) holds parameters of the model; give what makes one for those "
            "of the small network: optimizer=lambda p: torch.optim.SGD(p, lr=0.01)"
        )
    check_multiple(multiple_of)


def try_loss(loss: Loss, twin: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Call a loss once, as in training, so that a wrong one is noticed before the work begins."""
    with left_as_it_was(twin, training=True), torch.enable_grad():
        batch, output = like_model(twin, batch), None
        with suppress(Exception):  # a batch of one input under BatchNorm, which training will name
            output = run_batch(twin, batch, forward)
        if output is not None:
            loss_of(loss, output, batch)


def error_of(found: Any) -> float:
    """Return as a number what a ``validate`` has returned. Raises `PlasticError` where it is none, or NaN."""
    if (error := as_float(found)) is None:
        raise PlasticError(f"validate= returned {described(found)}; it returns a number, lower for better")
    if math.isnan(error):
        raise NotFinite("validate= returned NaN, which is neither better nor worse than anything")
    return error


def loss_of(loss: Loss, output: Any, batch: Any) -> Tensor:
    """Return the losses of an output. Raises `PlasticError` where the function does not take it."""
    way_out = "it gets an output and its batch, as in loss=lambda output, batch: F.cross_entropy(output, batch[1])"
    try:
        found = loss(output, batch)
    except PlasticError:
        raise
    except Exception as error:  # a function of the user's can raise anything
        raise PlasticError(
            f"loss= raises {error!r} on an output, {described(output)}, and its batch, {described(batch)}; {way_out}"
        ) from error
    if not isinstance(found, Tensor):
        raise PlasticError(f"loss= returned {described(found)}, and not a tensor with the losses; {way_out}")
    return found
