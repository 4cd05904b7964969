"""From losses and slopes to the gradient of the logits: the surrogate, and what acts in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.learning.draws import mixed
from plasticnet.learning.estimators import Draw, Estimator
from plasticnet.learning.sampler import Sampler, Step


def surrogate(net: GatedModel, gradient: Tensor) -> Tensor:
    """A scalar of value 0 whose gradient with respect to all logits is ``gradient``, shape (units,), or (units +
    weights,) where single weights have gates."""
    total = net.phi() @ gradient
    return total - total.detach()


def estimate(
    net: GatedModel, sampler: Sampler, step: Step, losses: Sequence[Tensor], slopes: Sequence[Tensor] = ()
) -> Tensor:
    """The estimate for all logits, shape (units,) or (units + weights,), from the losses under the gates of every pass
    and from the slopes of every draw, as far as they are known; 0 for gates that are held open.

    Raises `PlasticError` when gates were drawn per sample and the losses are not one per sample.
    """
    draw = step.draw
    assert draw is not None
    if draw.rows > 1 and losses[0].shape != (draw.rows,):
        raise PlasticError(
            f"gates were drawn for {draw.rows} samples, but the closure returned losses of shape "
            f'{tuple(losses[0].shape)}; return one loss per sample (reduction="none"), or construct PlasticNet with '
            'gates="batch"'
        )
    f = torch.stack(list(losses)).to(draw.pi.dtype).reshape(len(losses), -1)
    parts: list[Tensor] = []
    estimator = sampler.rule
    for i, draw in enumerate(step.draws):
        part = estimator.losses(draw, net.k, f if draw.rows > 1 else f.mean(1, keepdim=True))
        held = _held(net) if draw is step.draw else None
        part = part if held is None else torch.where(held, 0.0, part)
        parts.append(part + _of_slopes(estimator, net.k, draw, slopes[i], mixed(net, draw.rows)) if slopes else part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def training_gates(net: GatedModel, sampler: Sampler, step: Step, draw: Draw) -> Tensor:
    """The gates of the training pass, shape (rows, units). In the backward pass the logits get the part of the
    estimate that depends on the slopes there."""
    estimator, k = sampler.rule, net.k  # as they are now, also if the backward pass comes late
    z = estimator.gates(draw, 0)
    of_weights = draw is step.weights
    gates = list(net.weights.values() if of_weights else net.sites.values())
    first = sum(map(len, net.sites.values())) if of_weights else 0
    if estimator.at != "training" or not step.gradients or not gates:
        return z
    together = mixed(net, draw.rows)

    def part(slopes: Tensor) -> Tensor:
        gradient = net.ranks.average(_of_slopes(estimator, k, draw, slopes, together))
        if step.gradient is not None and step.scale is not None:
            step.of_slopes[first] = gradient.detach() / step.scale
            total = step.gradient.clone()
            for at, each in step.of_slopes.items():
                total[at : at + len(each)] += each
            sampler.gradient = total
        return gradient

    with torch.enable_grad():  # a first call of the network may be without
        gated = _Slopes.apply(torch.cat([g.phi.flatten() for g in gates]), z, part)
    assert isinstance(gated, Tensor)
    step.gated.append(gated)
    return gated


class _Slopes(torch.autograd.Function):
    """Gates (rows, units) as they are; backward, the logits get a function of the gradient with respect to them."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, z: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.part = part
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.part(grad), None, None


class Scaled(torch.autograd.Function):
    """The loss as it is; backward, notes by what it is scaled (for half precision, or accumulation)."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, step: Step) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.step = step
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.step.scale = grad
        return grad, None


def _of_slopes(estimator: Estimator, k: float, draw: Draw, slopes: Tensor, together: Tensor | None) -> Tensor:
    """The part of the estimate that depends on the slopes, shape (units,). Of gates that are shared, a mask (units,),
    the first row holds what all rows have in common."""
    assert estimator.slopes is not None
    return estimator.slopes(draw, k, slopes if together is None else torch.where(together, slopes.mean(0), slopes))


def _held(net: GatedModel) -> Tensor | None:
    """The units that are held open, if there are units."""
    graces = [s.grace for s in net.sites.values()]
    return torch.cat(graces) > 0 if graces else None
