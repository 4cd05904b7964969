"""Estimates to second order how much the loss changes without a unit: by the squares of each sample's derivatives.

The Fisher information of a gate is the mean over samples of the squared derivative of the loss with respect to it. Half
of it is the second-order change of the loss when the gate closes, because at a minimum the Fisher information is the
curvature (Theis et al., arXiv 1801.05787). Where targets are drawn from the model's own outputs it needs no labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.oneshot.derivatives import derivatives, draws_apart, random_signs, signed_derivatives
from plasticnet.tools.batches import Forward, check_batches, rows, rows_of, run_batch, some_rows, splittable
from plasticnet.tools.inputs import Loss, Outputs
from plasticnet.tools.outputs import check_finite_outputs, classes_of, counted

DRAWS = 8  # so many signs or targets are drawn where samples share their gates
_SEED = 0


def fisher_of_loss(net: PlasticNet, loss: Loss) -> Tensor:
    """Return half the mean of the squared derivatives of samples' losses with respect to each gate, shape (units,).

    Where the samples must share their gates, sums of the losses with random signs are taken. Of a mean loss there is
    only the square of its derivative.

    Args:
        net: The network.
        loss: A function without arguments that returns losses, shape (batch,), or their mean.

    Raises:
        PlasticError: The loss does not depend on the network.
    """
    if draws_apart(net):
        try:
            found = derivatives(net, loss, apart=True)
            if len(found) > 1:
                return found.square().mean(0) / 2
        except PlasticError:  # The rows may not be samples. Any other error will be raised again below.
            pass
    found = signed_derivatives(net, loss, DRAWS, torch.Generator().manual_seed(_SEED))
    return found.square().mean(0) / 2


def fisher_of_outputs(
    net: PlasticNet, batches: Iterable[Any], most: int, forward: Forward | None, outputs: Outputs | None
) -> Tensor:
    """Return the same for targets that are drawn from the model's own outputs, shape (units,).

    No target is drawn as such: random sums of the outputs are taken whose gradients have the same mean square. For
    outputs that are no classes this is a sum with random signs, each entry divided by the standard deviation of its
    tensor, which has the Fisher information of a normal distribution.

    Args:
        net: The network.
        batches: The inputs, which can be read again and again.
        most: The number of inputs at which reading stops.
        forward: What runs the network on a batch, where its form does not fit.
        outputs: What counts in the output; None for all.

    Raises:
        PlasticError: The batches are no batches, or the output has no floating tensors.
    """
    apart, generator = draws_apart(net), torch.Generator().manual_seed(_SEED)
    total, n = torch.zeros((), dtype=torch.float64), 0
    for batch in up_to(batches, most):

        def drawn(batch: Any = batch) -> Tensor:
            return drawn_sums(run_batch(net, batch, forward), rows(batch), outputs, generator)

        found = None
        if apart:
            try:
                found = derivatives(net, drawn, apart=True).square().sum(0)
            except PlasticError:  # The rows may not be samples.
                apart = False
        if found is None:
            summed = lambda drawn=drawn: drawn().sum()  # noqa: E731
            several = [derivatives(net, summed, apart=False).square().sum(0) for _ in range(DRAWS)]
            found = torch.stack(several).mean(0)
        total, n = total + found / 2, n + rows(batch)
    return total / n


def up_to(batches: Iterable[Any], most: int) -> Iterator[Any]:
    """Yield batches up to a number of inputs; the last one is shortened if its rows can be split.

    Raises:
        PlasticError: The batches cannot be read again and again, there are none, or one of them is empty.
    """
    check_batches(batches)
    left = most
    for place, batch in enumerate(batches, 1):
        if left <= 0:
            return
        n = rows_of(batch, place)
        yield some_rows(batch, slice(0, left)) if n > left and splittable(batch) else batch
        left -= n
    if left == most:
        raise PlasticError("there are no batches to read")


def drawn_sums(output: Any, n: int, outputs: Outputs | None, generator: torch.Generator) -> Tensor:
    """Return a sum of an output whose gradient has the mean square of that of the log likelihood of drawn targets.

    For classes that gradient is a class drawn, as 1 and 0, minus the probabilities p. Its products have the mean
    diag(p) - p pᵀ, and so have those of signs times the roots of p, minus p times their sum. These vary much less:
    where a model is sure, another class is hardly ever drawn, and then counts for all the others.

    Args:
        output: What the model returned.
        n: The number of inputs.
        outputs: What counts in it.
        generator: What draws the targets.

    Returns:
        Shape (n,), or a scalar where the output has not one row for each input.

    Raises:
        PlasticError: What counts in the output is NaN or infinite.
    """
    logits = classes_of(output, outputs)
    if logits is not None:
        check_finite_outputs([logits], "a batch that scores are taken on")
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        p = wide.detach().softmax(1)
        drawn = p.sqrt() * random_signs(p.shape, generator).to(p)
        return ((drawn - p * drawn.sum(1, keepdim=True)) * wide).sum(1)
    tensors, terms = counted(output, outputs), list[Tensor]()
    check_finite_outputs(tensors, "a batch that scores are taken on")
    for y in tensors:
        wide = y.float() if y.dtype.itemsize < 4 else y
        scale = wide.detach().std(correction=0).clamp(min=torch.finfo(wide.dtype).tiny)
        terms.append(wide * random_signs(y.shape, generator).to(wide) / scale)
    if all(len(t) == n for t in terms):
        return torch.stack([t.flatten(1).sum(1) if t.dim() > 1 else t for t in terms]).sum(0)
    return torch.stack([t.sum() for t in terms]).sum()
