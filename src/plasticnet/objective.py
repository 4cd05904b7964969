"""The expected loss over the gates: draws, passes, and the surrogate that carries the estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from plasticnet.errors import PlasticError
from plasticnet.estimators import ESTIMATORS, partner_gates
from plasticnet.snapshot import Snapshot, side_effect_free

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet


@dataclass
class Pass:
    """One run of the closure: which gates it uses, and the draw that it made."""

    role: str = "free"  # "training", "partner", "probe"; "free" outside expected_loss
    calls: int = 0
    sizes: set[int] = field(default_factory=set)  # of the first two axes of the inputs; one of them is the batch
    u: Tensor | None = None
    v: Tensor | None = None
    probe: Callable[[int], Tensor] | None = None


def batch_size(args: Any, kwargs: Any) -> int:
    """The length of the first axis of the first tensor."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether samples interact through normalisation by statistics of the batch."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in model.modules()
    )


def draw(net: PlasticNet, args: Any, kwargs: Any) -> Tensor:
    """The gates for one forward pass: (batch, units + 1), or (1, units + 1) when the batch shares them."""
    now = net._pass
    if now.role == "probe":
        assert now.probe is not None
        return now.probe(batch_size(args, kwargs))
    pi = torch.cat([s.probability(net.k).detach() for s in net._sites()])
    rows = batch_size(args, kwargs) if _draws_per_sample(net) else 1
    if now.u is None or now.role == "free":
        now.u = _uniform(net, rows, pi)
        now.v = _uniform(net, rows, pi) if ESTIMATORS[net.estimator].partner == "independent" else None
    elif len(now.u) != rows:
        raise PlasticError(
            f"the closure called the network on batches of {len(now.u)} and of {rows}; gates are drawn once for both, "
            'so construct PlasticNet with gates="batch"'
        )
    if now.role == "partner":
        z = partner_gates(ESTIMATORS[net.estimator].partner, now.u, now.v, pi)
    else:
        z = (now.u < pi).to(pi.dtype)
    return torch.cat([z, z.new_ones(len(z), 1)], 1)


def _uniform(net: PlasticNet, rows: int, pi: Tensor) -> Tensor:
    u = torch.rand(rows, len(pi), device=pi.device, dtype=pi.dtype)
    if rows > 1:  # sites whose rows are not samples share one draw
        u = torch.where(_shared(net), u[:1], u)
    return u


def _shared(net: PlasticNet) -> Tensor:
    """Which gates the whole batch shares in any case, a boolean mask of shape (units,)."""
    return torch.cat(
        [torch.full((len(s),), not net._gating.per_sample[s.name], device=s.phi.device) for s in net._sites()]
    )


def _draws_per_sample(net: PlasticNet) -> bool:
    if net.gates_mode == "batch" or not any(net._gating.per_sample.values()):
        return False
    if net.gates_mode == "sample":
        return True
    return net._samples_apart is not False and not uses_batch_statistics(net.model)


def _run(
    net: PlasticNet, closure: Callable[[], Tensor], role: str, probe: Callable[[int], Tensor] | None = None
) -> Tensor:
    net._pass = Pass(role, probe=probe)
    try:
        f = closure()
        calls, sizes = net._pass.calls, net._pass.sizes
    finally:
        net._pass.role = "free"
    if calls == 0:
        raise PlasticError("the closure never called the network; compute the loss from net(x), not from net.model(x)")
    if not isinstance(f, Tensor) or f.dim() > 1 or not f.is_floating_point():
        what = f"a tensor of shape {tuple(f.shape)} and {f.dtype}" if isinstance(f, Tensor) else f"a {type(f).__name__}"
        raise PlasticError(
            f"the closure returned {what}; it must return the losses of the samples, shape (batch,), "
            "or their mean, a scalar"
        )
    if f.dim() and len(f) not in {*sizes, calls * max(sizes, default=0)}:
        raise PlasticError(
            f"the closure returned losses of shape {tuple(f.shape)}, which is not (batch,); "
            "return one per sample, or the mean"
        )
    if not bool(torch.isfinite(f.detach()).all()):
        raise PlasticError("the loss is not finite (NaN or infinite); lower the learning rate or check the data")
    return f


def expected_loss(net: PlasticNet, closure: Callable[[], Tensor]) -> Tensor:
    """See `PlasticNet.expected_loss`."""
    if not net.training:
        raise PlasticError("expected_loss needs training mode; call net.train() first")
    snapshot = Snapshot(net.model)
    try:
        return _estimate(net, closure, snapshot)
    except BaseException:  # a bad batch must not ruin BatchNorm's statistics
        snapshot.restore()
        raise


def _estimate(net: PlasticNet, closure: Callable[[], Tensor], snapshot: Snapshot) -> Tensor:
    if net.k == 0 or math.isinf(net.k) or not _uncertain(net):
        f = _run(net, closure, "training")
        return f.mean() if f.dim() else f
    _resolve_auto(net, closure)
    estimator = ESTIMATORS[net.estimator]
    f2 = None
    if estimator.partner != "none":
        with side_effect_free(net.model, snapshot):
            f2 = _run(net, closure, "partner")
    f1 = _run(net, closure, "training")
    loss = f1.mean() if f1.dim() else f1
    return loss + _surrogate(net, f1.detach(), (f1 if f2 is None else f2).detach())


def _uncertain(net: PlasticNet) -> bool:
    with torch.no_grad():
        pi = torch.cat([s.probability(net.k) for s in net._sites()])
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
        z = all_open(rows)
        z[: rows // 2, :-1] = torch.where(_shared(net), 1.0, torch.rand(rows // 2, units, device=device).round())
        return z

    try:
        with side_effect_free(net.model):
            reference = _run(net, closure, "probe", all_open)
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
            moved = _run(net, closure, "probe", half_random)
    except PlasticError:  # rows that are not samples, or a loss that overflows: one draw per batch is safe
        net._samples_apart = False
        return
    half = len(reference) // 2
    net._samples_apart = torch.allclose(reference[half:], moved[half:], rtol=1e-4, atol=1e-6)


def _surrogate(net: PlasticNet, f1: Tensor, f2: Tensor) -> Tensor:
    """A scalar of value 0 whose gradient with respect to the logits is the estimate."""
    u = net._pass.u
    assert u is not None
    if len(u) > 1 and f1.shape != (len(u),):
        raise PlasticError(
            f"gates were drawn for {len(u)} samples, but the closure returned losses of shape {tuple(f1.shape)}; "
            'return one loss per sample (reduction="none"), or construct PlasticNet with gates="batch"'
        )
    total = torch.zeros((), device=u.device)
    start = 0
    for site in net._sites():
        columns = slice(start, start := start + len(site))
        per_sample = len(u) > 1 and net._gating.per_sample[site.name]
        gradient = site_gradient(net, site, columns, u, f1, f2, per_sample)
        total = total + (site.phi * gradient).sum()
    return total - total.detach()


def site_gradient(
    net: PlasticNet, site: Any, columns: slice, u: Tensor, f1: Tensor, f2: Tensor, per_sample: bool
) -> Tensor:
    """The estimate for one site's logits, shape (units,); 0 for gates that are held open."""
    estimator = ESTIMATORS[net.estimator]
    pi = site.probability(net.k).detach()
    u = u[:, columns] if per_sample else u[:1, columns]
    v = net._pass.v
    if v is not None:
        v = v[:, columns] if per_sample else v[:1, columns]
    if not per_sample:
        f1, f2 = f1.mean().reshape(1), f2.mean().reshape(1)
    z1 = (u < pi).to(u.dtype)
    z2 = z1 if estimator.partner == "none" else partner_gates(estimator.partner, u, v, pi)
    gradient = estimator.gradient(u, z1, z2, pi, net.k, f1.to(u.dtype), f2.to(u.dtype))
    return torch.where(site.grace > 0, 0.0, gradient)
