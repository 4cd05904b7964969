"""The expected loss over the gates: draws, passes, and the surrogate that carries the estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plasticnet import distributed
from plasticnet.errors import PlasticError
from plasticnet.estimators import ESTIMATORS, Draw, Estimator
from plasticnet.gates import probabilities
from plasticnet.passes import (
    Alike,
    Pass,
    Step,
    draws_per_sample,
    has_running_statistics,
    mixed,
    run,
    shared,
    uses_batch_statistics,
)
from plasticnet.prefix import Diverged
from plasticnet.snapshot import RandomState, Snapshot, side_effect_free

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet


def expected_loss(net: PlasticNet, closure: Callable[[], Tensor]) -> Tensor:
    """See `PlasticNet.expected_loss`."""
    if not net.training:
        raise PlasticError("expected_loss needs training mode; call net.train() first")
    distributed.enter(net)
    before = Snapshot(net.model)
    try:
        return _estimate(net, closure, before)
    except BaseException:  # a bad batch must not ruin BatchNorm's statistics
        before.restore()
        raise


def _estimate(net: PlasticNet, closure: Callable[[], Tensor], before: Snapshot) -> Tensor:
    if net.k == 0 or math.isinf(net.k) or not _uncertain(net):
        f = run(net, closure, Pass("training"))
        return f.mean() if f.dim() else f
    _resolve_auto(net, closure)
    step = Step(gradients=torch.is_grad_enabled())
    f, gradient = _passes(net, closure, before, step)
    step.gradient = distributed.average(net, gradient)
    loss = (f.mean() if f.dim() else f) + surrogate(net, step.gradient)
    if ESTIMATORS[net.estimator].at != "training":
        net._gate_gradient = step.gradient
        return loss
    # All gates are part of the loss, used or not: else a rank whose blocks are closed would not come to its slopes.
    tied = [0 * z.sum() for z in step.gated]
    step.gated.clear()  # their graph knows the step
    scaled = _Scaled.apply(loss + sum(tied), step)
    assert isinstance(scaled, Tensor)
    return scaled


def _passes(net: PlasticNet, closure: Callable[[], Tensor], before: Snapshot, step: Step) -> tuple[Tensor, Tensor]:
    """Run all passes of a step: the losses to train on, and the estimate as far as it is known before the
    backward pass. The training pass comes last, and is handed what the others computed before the first gate."""
    estimator = ESTIMATORS[net.estimator]
    # Where samples meet in the statistics of a batch, losses are compared under the running ones instead.
    running = draws_per_sample(net) and uses_batch_statistics(net.model) and has_running_statistics(net.model)
    indices = [i for i in estimator.reads if running or i]
    step.prefix = net._gating.prefix() if indices else None
    found: dict[int, Tensor] = {}
    slopes: list[Tensor] = []
    try:
        for i in indices:
            now = Pass("partner", step, _gates_of(net, i), running)
            found[i] = _again(net, before, now, partial(_aside, net, closure, after=before))
        if running:  # what comes before the first gate differs, too
            step.prefix = None
        if estimator.at == "mean":
            slopes = _slopes_at_mean(net, closure, step, before)
        training = Pass("training", step, partial(_training_gates, net, step))
        f = _again(net, before, training, partial(run, net, closure))
    except Alike as alike:
        before.restore()
        f, found[1] = _nearly_equal(net, closure, before, step, alike.rows)
    found.setdefault(0, f.detach())
    return f, estimate(net, step, [found.get(i, found[0]) for i in range(estimator.partners + 1)], slopes)


def _gates_of(net: PlasticNet, i: int) -> Callable[[Draw], Tensor]:
    gates = ESTIMATORS[net.estimator].gates
    return lambda draw: gates(draw, i)


def _again(net: PlasticNet, before: Snapshot, now: Pass, run: Callable[[Pass], Tensor]) -> Tensor:
    """Run a pass; if what it was handed does not fit, once more and with nothing."""
    prefix = now.step.prefix
    try:
        return run(now)
    except (Diverged, RuntimeError) as error:
        # A tensor without content that was read outside of the call, or in TorchScript, which makes its own error.
        empty = prefix is not None and prefix.dropped and ("meta" in str(error) or "Diverged" in str(error))
        if not (isinstance(error, Diverged) or empty):
            raise
    net._gating.keep_results = True
    now.step.prefix = None
    before.restore()
    return run(Pass(now.role, now.step, now.gates, now.running))


def _aside(net: PlasticNet, closure: Callable[[], Tensor], now: Pass, after: Snapshot) -> Tensor:
    """The losses of a pass without gradients, after which everything is put to the state ``after``."""
    with side_effect_free(net.model, after):
        return run(net, closure, now).detach()


def _nearly_equal(
    net: PlasticNet, closure: Callable[[], Tensor], before: Snapshot, step: Step, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses of the training pass and of the partner's, where only some samples have to be computed again:
    the training pass comes first."""
    step.prefix = None
    training = Pass("training", step, outputs=[])
    f1 = run(net, closure, training)
    if not len(rows):
        return f1, f1.detach()
    gates = _gates_of(net, 1)
    after, f2 = Snapshot(net.model), None
    if after.random == step.after:  # else each sample's dropout depends on how many there are
        before.restore()
        try:
            f2 = _aside(net, closure, Pass("partner", step, gates, outputs=training.outputs, rows=rows), after)
        except (Diverged, Exception):  # it does not run on some of the samples
            f2 = None
    if f2 is None:
        net._rows_apart = False
    if f2 is None or net._rows_apart is None:  # at first, check that this is exact
        before.restore()
        whole = _aside(net, closure, Pass("partner", step, gates), after)
        if f2 is not None and not torch.equal(whole, f1):  # else nothing moves, and nothing was seen
            net._rows_apart = torch.allclose(f2, whole, rtol=1e-4, atol=1e-6)
        f2 = f2 if f2 is not None and net._rows_apart else whole
    return f1, f2


# -- slopes -----------------------------------------------------------------------------------


def _slopes_at_mean(net: PlasticNet, closure: Callable[[], Tensor], step: Step, before: Snapshot) -> list[Tensor]:
    """The gradient of the mean loss with respect to the gates of each row, at z = pi: shape (rows, units), for every
    draw of the step."""
    leaves: dict[int, Tensor] = {}

    def gates(draw: Draw) -> Tensor:
        leaves[id(draw)] = draw.pi.expand(draw.rows, -1).clone().requires_grad_()
        return leaves[id(draw)]

    f = _again(net, before, Pass("partner", step, gates), partial(run, net, closure))
    slopes = torch.autograd.grad(f.mean(), [leaves[id(draw)] for draw in step.draws], materialize_grads=True)
    before.restore()
    return list(slopes)


def _training_gates(net: PlasticNet, step: Step, draw: Draw) -> Tensor:
    """The gates of the training pass. In the backward pass the logits get the part of the estimate that depends
    on the slopes there."""
    estimator, k = ESTIMATORS[net.estimator], net.k  # as they are now, also if the backward pass comes late
    z = estimator.gates(draw, 0)
    gates, first = (net._weights(), sum(map(len, net._sites()))) if draw is step.weights else (net._sites(), 0)
    if estimator.at != "training" or not step.gradients or not gates:
        return z
    together = mixed(net, draw.rows)

    def part(slopes: Tensor) -> Tensor:
        gradient = distributed.average(net, _of_slopes(estimator, k, draw, slopes, together))
        if step.gradient is not None and step.scale is not None:
            step.of_slopes[first] = gradient.detach() / step.scale
            total = step.gradient.clone()
            for at, each in step.of_slopes.items():
                total[at : at + len(each)] += each
            net._gate_gradient = total
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


class _Scaled(torch.autograd.Function):
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


def _uncertain(net: PlasticNet) -> bool:
    """Whether any gate can differ between two draws. Not asked of a GPU, which would mean waiting for it."""
    if net._like.is_cuda:
        return True
    pi = probabilities(net._gated(), net.k)
    return bool(((pi > 0) & (pi < 1)).any())


def _resolve_auto(net: PlasticNet, closure: Callable[[], Tensor]) -> None:
    """Find out once whether gates can be drawn per sample: the closure returns (batch,), and the
    loss of a sample does not move when the gates of others do."""
    if net.gates_mode != "auto" or net._samples_apart is not None or uses_batch_statistics(net.model):
        return
    units = sum(len(s) for s in net._sites())
    device = net._like.device

    def all_open(rows: int) -> Tensor:
        return torch.ones(rows, units + 1, device=device)

    def half_random(rows: int) -> Tensor:
        z, before = all_open(rows), RandomState(net.model)
        z[: rows // 2, :-1] = torch.where(shared(net), 1.0, torch.rand(rows // 2, units, device=device).round())
        before.restore()  # the network's own dropout is the same in both probes
        return z

    try:
        with side_effect_free(net.model):
            reference = run(net, closure, Pass("probe", probe=all_open))
    except PlasticError:  # a layer's rows are not the samples; whatever else is wrong will be said again
        net._samples_apart = False
        return
    if reference.dim() and len(reference) < 2:
        return  # one sample says nothing about two: ask the next batch
    if not reference.dim() or not any(net._gating.per_sample.values()):
        net._samples_apart = False
        return
    try:
        with side_effect_free(net.model):
            moved = run(net, closure, Pass("probe", probe=half_random))
    except PlasticError:  # rows that are not samples, or a loss that overflows: one draw per batch is safe
        net._samples_apart = False
        return
    half = len(reference) // 2
    if torch.equal(reference[:half], moved[:half]):
        return  # nothing moves (a head that starts at zero): ask the next batch
    net._samples_apart = torch.allclose(reference[half:], moved[half:], rtol=1e-4, atol=1e-6)


# -- the estimate -----------------------------------------------------------------------------


def surrogate(net: PlasticNet, gradient: Tensor) -> Tensor:
    """A scalar of value 0 whose gradient with respect to all logits is ``gradient``, shape (units,), or (units +
    weights,) where single weights have gates."""
    total = net._phi() @ gradient
    return total - total.detach()


def estimate(net: PlasticNet, step: Step, losses: Sequence[Tensor], slopes: Sequence[Tensor] = ()) -> Tensor:
    """The estimate for all logits, shape (units,) or (units + weights,), from the losses under the gates of every pass
    and from the slopes of every draw, as far as they are known; 0 for gates that are held open."""
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
    estimator = ESTIMATORS[net.estimator]
    for i, draw in enumerate(step.draws):
        part = estimator.losses(draw, net.k, f if draw.rows > 1 else f.mean(1, keepdim=True))
        held = _held(net) if draw is step.draw else None
        part = part if held is None else torch.where(held, 0.0, part)
        parts.append(part + _of_slopes(estimator, net.k, draw, slopes[i], mixed(net, draw.rows)) if slopes else part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _held(net: PlasticNet) -> Tensor | None:
    """The units that are held open, if there are units."""
    graces = [s.grace for s in net._sites()]
    return torch.cat(graces) > 0 if graces else None
