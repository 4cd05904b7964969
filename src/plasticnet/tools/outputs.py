"""Finds in a model's output what counts: classes, or all floating tensors with a batch dimension."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.tools.inputs import Outputs
from plasticnet.tools.trees import tensors_within


def counted(output: Any, outputs: Outputs | None = None) -> list[Tensor]:
    """Return the floating tensors with a batch dimension in what a model returned.

    Args:
        output: What the model returned.
        outputs: Chooses what counts in it; None for all.

    Raises:
        PlasticError: There are none.
    """
    found = tensors_within(output if outputs is None else outputs(output))
    found = [t for t in found if t.is_floating_point() and t.dim()]
    if not found:
        raise PlasticError("the output has no floating tensor with a batch dimension; outputs=... chooses what counts")
    return found


def classes_of(output: Any, outputs: Outputs | None = None) -> Tensor | None:
    """Return the logits of a classifier's output, or None where it is something else.

    Logits are an output, or its attribute or key ``logits``, of shape (batch, classes) with two classes or more.

    Args:
        output: What the model returned.
        outputs: Chooses what counts in it; None for all.
    """
    chosen = output if outputs is None else outputs(output)
    if not isinstance(chosen, Tensor):
        chosen = chosen.get("logits") if isinstance(chosen, dict) else getattr(chosen, "logits", None)
    two = isinstance(chosen, Tensor) and chosen.dim() == 2 and chosen.shape[1] > 1 and chosen.is_floating_point()
    return chosen if two else None


def check_finite_outputs(tensors: Iterable[Tensor], which: str) -> None:
    """Raise `PlasticError` where what counts in the outputs of a trained model is NaN or infinite.

    Args:
        tensors: What counts in the outputs.
        which: On what the model has returned them, for the message.
    """
    if not all(bool(t.detach().isfinite().all()) for t in tensors):
        raise PlasticError(
            f"the model's outputs on {which} hold NaN or infinite numbers: look for such numbers in the inputs and in "
            "the weights; outputs=... says what counts"
        )
