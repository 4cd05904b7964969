"""The expected loss over the gates: draws, passes, and the surrogate that carries the estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plasticnet import distributed
from plasticnet.errors import PlasticError
from plasticnet.estimators import ESTIMATORS
from plasticnet.gates import probabilities
from plasticnet.passes import Alike, Draw, Pass, run, shared, uses_batch_statistics
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
    if ESTIMATORS[net.estimator].partner == "none":
        now = Pass("training")
        f1 = f2 = run(net, closure, now)
        draw = now.draw
    else:
        f1, f2, draw = _pair(net, closure, before)
    assert draw is not None
    loss = f1.mean() if f1.dim() else f1
    return loss + surrogate(net, distributed.average(net, estimate(net, draw, f1.detach(), f2.detach())))


def _pair(net: PlasticNet, closure: Callable[[], Tensor], before: Snapshot) -> tuple[Tensor, Tensor, Draw | None]:
    """The losses of the training pass, those under the partner's gates, and the draw."""
    partner = Pass("partner", prefix=net._gating.prefix())
    try:
        f2 = _aside(net, closure, partner, before)
    except Alike as alike:
        before.restore()
        return _nearly_equal(net, closure, before, alike)
    prefix = partner.prefix
    assert prefix is not None
    try:
        f1 = run(net, closure, Pass("training", partner.draw, prefix=prefix))
    except (Diverged, RuntimeError) as error:
        # A tensor without content that was read outside of the call, or in TorchScript, which makes its own error.
        empty = prefix.dropped and ("meta" in str(error) or "Diverged" in str(error))
        if not (isinstance(error, Diverged) or empty):
            raise
        net._gating.keep_results = True
        before.restore()
        f1 = run(net, closure, Pass("training", partner.draw))
    return f1, f2, partner.draw


def _aside(net: PlasticNet, closure: Callable[[], Tensor], now: Pass, after: Snapshot) -> Tensor:
    """The losses of a pass without gradients, after which everything is put to the state ``after``."""
    with side_effect_free(net.model, after):
        return run(net, closure, now).detach()


def _nearly_equal(
    net: PlasticNet, closure: Callable[[], Tensor], before: Snapshot, alike: Alike
) -> tuple[Tensor, Tensor, Draw]:
    """`_pair`, where only some samples have to be computed again: the training pass comes first."""
    draw, rows = alike.draw, alike.rows
    training = Pass("training", draw, outputs=[])
    f1 = run(net, closure, training)
    if not len(rows):
        return f1, f1, draw
    after, f2 = Snapshot(net.model), None
    if after.random == draw.after:  # else each sample's dropout depends on how many there are
        before.restore()
        try:
            f2 = _aside(net, closure, Pass("partner", draw, outputs=training.outputs, rows=rows), after)
        except (Diverged, Exception):  # it does not run on some of the samples
            f2 = None
    if f2 is None:
        net._rows_apart = False
    if f2 is None or net._rows_apart is None:  # at first, check that this is exact
        before.restore()
        whole = _aside(net, closure, Pass("partner", draw), after)
        if f2 is not None and not torch.equal(whole, f1):  # else nothing moves, and nothing was seen
            net._rows_apart = torch.allclose(f2, whole, rtol=1e-4, atol=1e-6)
        f2 = f2 if f2 is not None and net._rows_apart else whole
    return f1, f2, draw


def _uncertain(net: PlasticNet) -> bool:
    """Whether any gate can differ between two draws. Not asked of a GPU, which would mean waiting for it."""
    if net._sites()[0].phi.is_cuda:
        return True
    pi = probabilities(net._sites(), net.k)
    return bool(((pi > 0) & (pi < 1)).any())


def _resolve_auto(net: PlasticNet, closure: Callable[[], Tensor]) -> None:
    """Find out once whether gates can be drawn per sample: the closure returns (batch,), and the
    loss of a sample does not move when the gates of others do."""
    if net.gates_mode != "auto" or net._samples_apart is not None or uses_batch_statistics(net.model):
        return
    units = sum(len(s) for s in net._sites())
    device = net._sites()[0].phi.device

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
    """A scalar of value 0 whose gradient with respect to the logits of all sites is ``gradient``, shape (units,)."""
    total = torch.cat([s.phi for s in net._sites()]) @ gradient
    return total - total.detach()


def estimate(net: PlasticNet, draw: Draw, f1: Tensor, f2: Tensor) -> Tensor:
    """The estimate for the logits of all sites, shape (units,); 0 for gates that are held open."""
    rows = len(draw.u)
    if rows > 1 and f1.shape != (rows,):
        raise PlasticError(
            f"gates were drawn for {rows} samples, but the closure returned losses of shape {tuple(f1.shape)}; "
            'return one loss per sample (reduction="none"), or construct PlasticNet with gates="batch"'
        )
    estimator = ESTIMATORS[net.estimator]
    z1, z2 = draw.gates(estimator, partner=False), draw.gates(estimator, partner=True)
    f1, f2 = f1.to(z1.dtype), f2.to(z1.dtype)

    def over(rows: slice, f1: Tensor, f2: Tensor) -> Tensor:
        return estimator.gradient(draw.u[rows], z1[rows], z2[rows], draw.pi, net.k, f1, f2)

    if rows == 1 or not all(net._gating.per_sample.values()):
        together = over(slice(1), f1.mean().reshape(1), f2.mean().reshape(1))
        gradient = together if rows == 1 else torch.where(shared(net), together, over(slice(None), f1, f2))
    else:
        gradient = over(slice(None), f1, f2)
    return torch.where(torch.cat([s.grace for s in net._sites()]) > 0, 0.0, gradient)
