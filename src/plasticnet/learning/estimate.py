"""Turns losses and slopes into the gradient of the logits.

The part of the estimate that follows from the losses enters the loss as a `surrogate`. The part that follows from the
slopes is known in the backward pass only, where an autograd function hands it to the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.learning.coupling import Draw
from plasticnet.learning.draws import mixed
from plasticnet.learning.estimators import Estimator
from plasticnet.learning.sampler import Sampler, Step
from plasticnet.tools.precision import full_precision, product, widened


def surrogate(net: GatedModel, gradient: Tensor) -> Tensor:
    """Return a scalar of value 0 whose gradient with respect to the logits is ``gradient``.

    Args:
        net: The network.
        gradient: One number for each logit, shape (units,), or (units + weights,) where single weights have gates.
    """
    total = product(net.phi(), gradient)
    return total - total.detach()


def estimate(
    net: GatedModel, sampler: Sampler, step: Step, losses: Sequence[Tensor], slopes: Sequence[Tensor] = ()
) -> Tensor:
    """Return the estimate for all logits, as far as it is known before the backward pass.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        step: The training step, whose draws were made.
        losses: The losses under the gates of every pass of the estimator, each of shape (batch,) or a scalar.
        slopes: The slopes at the mean gates for every draw of the step, each of shape (rows, units). They are left out
            where the estimator takes none, or takes them in the backward pass.

    Returns:
        Shape (units,), or (units + weights,) where single weights have gates. It is 0 for gates that are held open.

    Raises:
        PlasticError: Gates were drawn per sample, and the losses are not one per sample.
    """
    draw = step.draw
    assert draw is not None
    if draw.rows > 1 and losses[0].shape != (draw.rows,):
        raise PlasticError(
            f"gates were drawn for {draw.rows} samples, but the closure returned losses of shape "
            f'{tuple(losses[0].shape)}; return one loss per sample (reduction="none"), or construct PlasticNet with '
            'gates="batch"'
        )
    if any(f.shape != losses[0].shape for f in losses):  # A closure may choose what it looks at by the outputs.
        losses = [widened(f).mean() for f in losses]
    f = torch.stack(list(losses)).to(draw.pi.dtype).reshape(len(losses), -1)
    parts: list[Tensor] = []
    estimator = sampler.rule
    with full_precision(draw.pi.device.type):
        for i, draw in enumerate(step.draws):
            part = estimator.losses(draw, net.k, f if draw.rows > 1 else f.mean(1, keepdim=True))
            held = _held(net) if draw is step.draw else None
            part = part if held is None else torch.where(held, 0.0, part)
            if slopes:
                part = part + _of_slopes(estimator, net.k, draw, slopes[i], mixed(net, draw.rows))
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def training_gates(net: GatedModel, sampler: Sampler, step: Step, draw: Draw) -> Tensor:
    """Return the gates of the training pass, through which the logits get their gradient from the slopes.

    In the backward pass the gradient with respect to these gates arrives, and the logits get the part of the estimate
    that follows from it.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        step: The training step.
        draw: One of the draws of the step: that of the units, or that of the single weights.

    Returns:
        The gates under this draw, shape (rows, units) or (1, weights).
    """
    # They are kept as they are now, because the backward pass may come late. The graph must not keep the network.
    estimator, k, ranks = sampler.rule, net.k, net.ranks
    z = estimator.gates(draw, 0)
    of_weights = draw is step.weights
    gates = list(net.weights.values() if of_weights else net.sites.values())
    first = sum(map(len, net.sites.values())) if of_weights else 0
    if estimator.at != "training" or not step.gradients or not gates:
        return z
    together = mixed(net, draw.rows)

    def part(slopes: Tensor) -> Tensor:
        gradient = ranks.average(_of_slopes(estimator, k, draw, slopes, together))
        if step.gradient is not None and step.scale is not None:
            step.of_slopes[first] = gradient.detach() / step.scale
            total = step.gradient.clone()
            for at, each in step.of_slopes.items():
                total[at : at + len(each)] += each
            sampler.gradient = total
        return gradient

    with torch.enable_grad():  # the first call of the network in a closure may run without gradients
        gated = _Slopes.apply(torch.cat([g.phi.flatten() for g in gates]), z, part)
    assert isinstance(gated, Tensor)
    step.gated.append(gated)
    return gated


class _Slopes(torch.autograd.Function):
    """Hands gates on unchanged; in the backward pass the logits get a function ``part`` of the gates' gradient."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, z: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.part = part
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.part(grad), None, None


class Scaled(torch.autograd.Function):
    """Hands the loss on unchanged; in the backward pass it notes in the step by what the loss was scaled.

    A loss is scaled for half precision, or where gradients are accumulated over several steps.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, step: Step) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.step = step
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.step.scale = grad
        return grad, None


def _of_slopes(estimator: Estimator, k: float, draw: Draw, slopes: Tensor, together: Tensor | None) -> Tensor:
    """Return the part of the estimate that follows from the slopes, shape (units,).

    Args:
        estimator: The estimator, which takes slopes.
        k: The k of the step.
        draw: The draw of the step.
        slopes: The gradient with respect to the gates, shape (rows, units).
        together: Which gates all rows share, a mask of shape (units,), where others differ between rows. The slope of a
            shared gate arrives in the first row, and is spread evenly over all rows.
    """
    assert estimator.slopes is not None
    with full_precision(slopes.device.type):  # the backward pass may run under autocast, too
        return estimator.slopes(draw, k, slopes if together is None else torch.where(together, slopes.mean(0), slopes))


def _held(net: GatedModel) -> Tensor | None:
    """Return which units are held open or sleep, a mask of shape (units,), or None where there are no units."""
    graces = [s.grace for s in net.sites.values()]
    return torch.cat(graces) != 0 if graces else None
