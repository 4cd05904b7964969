"""One run of the closure: the gates that it draws, and what can be taken over from the run before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from plasticnet.errors import PlasticError
from plasticnet.estimators import ESTIMATORS, Estimator, partner_gates
from plasticnet.gates import probabilities
from plasticnet.prefix import Diverged, Prefix, tensors_of
from plasticnet.snapshot import RandomState

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet


@dataclass
class Draw:
    """The uniform numbers of one step, shape (rows, units), with 1 row when the batch shares its gates;
    ``v`` is there for an independent partner only. ``pi`` are the probabilities, shape (units,)."""

    pi: Tensor
    u: Tensor
    v: Tensor | None
    after: RandomState  # the generators when these had been drawn

    def gates(self, estimator: Estimator, partner: bool) -> Tensor:
        """The gates of one pass, shape (rows, units)."""
        if partner and estimator.partner != "none":
            return partner_gates(estimator.partner, self.u, self.v, self.pi)
        return (self.u < self.pi).to(self.pi.dtype)


@dataclass
class Pass:
    """One run of the closure: what for, the gates it uses, and what the network was called with."""

    role: str = "free"  # "training", "partner", "probe"; "free" outside expected_loss
    draw: Draw | None = None
    z: Tensor | None = None
    probe: Callable[[int], Tensor] | None = None
    record: list[Prefix] | None = None  # of the calls: to be filled
    replay: list[Prefix] = field(default_factory=list)  # of the calls of the pass before
    keep: list[Any] | None = None  # what the calls return: to be filled
    outputs: list[Any] = field(default_factory=list)  # what the calls of the pass before returned
    rows: Tensor | None = None  # the samples for which the gates differ from those of that pass
    calls: int = 0
    sizes: set[int] = field(default_factory=set)  # of the first two axes of the inputs; one of them is the batch

    def note(self, args: Any, kwargs: Any) -> None:
        """A call of the network."""
        self.calls += 1
        self.sizes.update(n for t in tensors_of((args, kwargs)) for n in t.shape[:2])


def batch_size(args: Any, kwargs: Any) -> int:
    """The length of the first axis of the first tensor."""
    return next((len(t) for t in tensors_of((args, kwargs)) if t.dim()), 1)


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether samples interact through normalisation by statistics of the batch."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in model.modules()
    )


# -- one call of the network ------------------------------------------------------------------


def drawn(net: PlasticNet, args: Any, kwargs: Any) -> Any:
    """Run the network under gates that are drawn: as one call of the pass that is running."""
    now = net._pass
    if now.role == "free":
        now = Pass()
    z = _gates(net, now, args, kwargs)
    call = now.calls
    now.note(args, kwargs)
    if now.rows is not None:
        return _some_rows(net, now, z, args, kwargs, now.outputs[call])
    prefix = None
    if now.record is not None:
        if call == 0:
            _compare(net, now)
        now.record.append(net._gating.prefix((args, kwargs)))
        prefix = now.record[-1].recording
    elif call < len(now.replay) and now.replay[call].replays((args, kwargs)):
        prefix = now.replay[call].replaying
    output = net._run(z, args, kwargs, prefix=prefix)
    if now.keep is not None:
        now.keep.append(tree_map_only(Tensor, Tensor.detach, output))
    return output


class Alike(Exception):
    """The gates of the two passes differ for few samples or none: ``rows`` are their indices."""

    def __init__(self, draw: Draw, rows: Tensor) -> None:
        super().__init__()
        self.draw, self.rows = draw, rows


def _compare(net: PlasticNet, now: Pass) -> None:
    """Raise `Alike` if it pays and is exact to compute only the samples whose gates differ: when samples do
    not interact. Not asked of a GPU, which would mean waiting for it."""
    draw, estimator = now.draw, ESTIMATORS[net.estimator]
    assert draw is not None
    if draw.u.is_cuda:
        return
    differ = (draw.gates(estimator, partner=False) != draw.gates(estimator, partner=True)).any(1)
    rows = differ.nonzero().squeeze(1)
    apart = len(draw.u) > 1 and net._samples_apart and net._rows_apart is not False
    if not len(rows) or (apart and 2 * len(rows) <= len(draw.u)):
        raise Alike(draw, rows)


def _some_rows(net: PlasticNet, now: Pass, z: Tensor, args: Any, kwargs: Any, before: Any) -> Any:
    """The output of the pass before, computed anew for some of the samples. Raises `Diverged` where the
    samples cannot be told."""
    tensors = tensors_of((args, kwargs))
    if len(tensors) != 1 or any(len(t) != len(z) for t in (*tensors, *tensors_of(before))):
        raise Diverged
    rows = now.rows
    assert rows is not None
    args, kwargs = tree_map_only(Tensor, lambda t: t[rows], (args, kwargs))
    output = net._run(z[rows], args, kwargs)
    return tree_map(lambda old, new: old.index_copy(0, rows, new) if isinstance(old, Tensor) else old, before, output)


def _gates(net: PlasticNet, now: Pass, args: Any, kwargs: Any) -> Tensor:
    """The gates of this call, shape (rows, units + 1)."""
    if now.role == "probe":
        assert now.probe is not None
        return now.probe(batch_size(args, kwargs))
    rows = batch_size(args, kwargs) if draws_per_sample(net) else 1
    if now.draw is None:
        now.draw = _draw(net, rows)
    elif len(now.draw.u) != rows:
        raise PlasticError(
            f"the closure called the network on batches of {len(now.draw.u)} and of {rows}; gates are drawn once for "
            'both, so construct PlasticNet with gates="batch"'
        )
    elif now.calls == 0:
        now.draw.after.restore()
    if now.z is None:
        z = now.draw.gates(ESTIMATORS[net.estimator], now.role == "partner")
        now.z = torch.cat([z, z.new_ones(len(z), 1)], 1)
    return now.z


def _draw(net: PlasticNet, rows: int) -> Draw:
    pi = probabilities(net._sites(), net.k).detach()
    u = _uniform(net, rows, pi)
    v = _uniform(net, rows, pi) if ESTIMATORS[net.estimator].partner == "independent" else None
    return Draw(pi, u, v, RandomState(net.model))


def _uniform(net: PlasticNet, rows: int, pi: Tensor) -> Tensor:
    u = torch.rand(rows, len(pi), device=pi.device, dtype=pi.dtype)
    if rows > 1 and not all(net._gating.per_sample.values()):  # sites whose rows are not samples share one draw
        u = torch.where(shared(net), u[:1], u)
    return u


def shared(net: PlasticNet) -> Tensor:
    """Which gates the whole batch shares in any case, a boolean mask of shape (units,)."""
    return torch.cat(
        [torch.full((len(s),), not net._gating.per_sample[s.name], device=s.phi.device) for s in net._sites()]
    )


def draws_per_sample(net: PlasticNet) -> bool:
    if net.gates_mode == "batch" or not any(net._gating.per_sample.values()):
        return False
    if net.gates_mode == "sample":
        return True
    return net._samples_apart is not False and not uses_batch_statistics(net.model)


def run(net: PlasticNet, closure: Callable[[], Tensor], now: Pass) -> Tensor:
    net._pass = now
    try:
        f = closure()
    finally:
        net._pass = Pass()
    if now.calls == 0:
        raise PlasticError("the closure never called the network; compute the loss from net(x), not from net.model(x)")
    if not isinstance(f, Tensor) or f.dim() > 1 or not f.is_floating_point():
        what = f"a tensor of shape {tuple(f.shape)} and {f.dtype}" if isinstance(f, Tensor) else f"a {type(f).__name__}"
        raise PlasticError(
            f"the closure returned {what}; it must return the losses of the samples, shape (batch,), "
            "or their mean, a scalar"
        )
    if f.dim() and len(f) not in {*now.sizes, now.calls * max(now.sizes, default=0)}:
        raise PlasticError(
            f"the closure returned losses of shape {tuple(f.shape)}, which is not (batch,); "
            "return one per sample, or the mean"
        )
    _check_finite(net, f.detach())
    return f


def _check_finite(net: PlasticNet, f: Tensor) -> None:
    """Raise `PlasticError` when a loss is not finite. The answer of a GPU is not waited for: it is read one of the
    next times."""
    finite = torch.isfinite(f).all()
    answers = [finite]
    if f.is_cuda:
        come, answer = torch.cuda.Event(), torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(finite, non_blocking=True)
        come.record()
        waiting = _WAITING.setdefault(net, [])
        waiting.append((come, answer))
        answers = []
        while waiting and waiting[0][0].query():
            answers.append(waiting.pop(0)[1])
    if not all(answers):
        _WAITING.pop(net, None)
        raise PlasticError("the loss is not finite (NaN or infinite); lower the learning rate or check the data")


# Answers of a GPU that have not come yet; not in the network, for events cannot be copied.
_WAITING: WeakKeyDictionary[PlasticNet, list[tuple[torch.cuda.Event, Tensor]]] = WeakKeyDictionary()
