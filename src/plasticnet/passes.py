"""One run of the closure: the gates that it draws, and what can be taken over from the run before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from plasticnet.errors import PlasticError
from plasticnet.estimators import ESTIMATORS, Draw
from plasticnet.gates import probabilities
from plasticnet.prefix import Diverged, Prefix
from plasticnet.snapshot import RandomState
from plasticnet.trees import tensors_within

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet


@dataclass
class Step:
    """What the passes of one training step share: the draw of the first (for units, and for single weights where
    they have gates), the random numbers after it, and what it recorded before the first gate. Then the estimate: the
    part that follows from the losses, in the backward pass also that of the slopes; and by what the loss was scaled."""

    draw: Draw | None = None
    weights: Draw | None = None
    after: RandomState | None = None
    prefix: Prefix | None = None
    gradients: bool = True  # whether they are wanted
    gated: list[Tensor] = field(default_factory=list)  # gates of the training pass that have slopes
    gradient: Tensor | None = None
    of_slopes: dict[int, Tensor] = field(default_factory=dict)  # by the first of the gates
    scale: Tensor | None = None

    @property
    def draws(self) -> list[Draw]:
        """Those that there are."""
        return [draw for draw in (self.draw, self.weights) if draw is not None]


@dataclass
class Pass:
    """One run of the closure: what for, the gates it uses, and what the network was called with.

    ``gates(draw)`` gives the gates, shape (rows, units), and from the other draw those of single weights, shape
    (1, weights); else they are those of the estimator's pass 0. The first "partner" fills the step's prefix, in its
    first call, and the passes behind it are handed what it holds. "training", which comes last, fills ``outputs``, if
    there are any, and a "partner" with ``rows`` computes them anew for these samples only. With ``running``, norms
    use their running statistics.
    """

    role: Literal["free", "probe", "partner", "training"] = "free"  # "free": outside of expected_loss
    step: Step = field(default_factory=Step)
    gates: Callable[[Draw], Tensor] | None = None
    running: bool = False
    z: Tensor | None = None
    weights: Mapping[str, Tensor] | None = None  # gates of the entries of weights, where not all are open
    probe: Callable[[int], Tensor] | None = None
    outputs: list[Any] | None = None
    rows: Tensor | None = None
    calls: int = 0
    sizes: set[int] = field(default_factory=set)  # of the first two axes of the inputs; one of them is the batch

    def note(self, args: Any, kwargs: Any) -> None:
        """A call of the network."""
        self.calls += 1
        self.sizes.update(n for t in tensors_within((args, kwargs)) for n in t.shape[:2])


def batch_size(args: Any, kwargs: Any) -> int:
    """The length of the first axis of the first tensor."""
    return next((len(t) for t in tensors_within((args, kwargs)) if t.dim()), 1)


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether samples interact through normalisation by statistics of the batch."""
    return any(m.training or m.running_mean is None for m in _batch_norms(model))


def has_running_statistics(model: nn.Module) -> bool:
    """Whether all norms over the batch could use their running statistics."""
    return all(m.running_mean is not None for m in _batch_norms(model))


def _batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Within this context norms over the batch use their running statistics."""
    norms = [m for m in _batch_norms(model) if m.training]
    for m in norms:
        m.training = False
    try:
        yield
    finally:
        for m in norms:
            m.training = True


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
        return _some_rows(net, now, z, args, kwargs, (now.outputs or [])[call])
    prefix, recorded = None, now.step.prefix
    if recorded is not None and call == 0:  # before later calls gates have acted
        if not recorded.inputs:
            if now.role == "partner":
                _compare(net, now)
                recorded.inputs = tensors_within((args, kwargs))
                prefix = recorded.recording
        elif recorded.replays((args, kwargs), last=now.role == "training"):
            prefix = partial(recorded.replaying, last=now.role == "training")
    output = net._run(z, args, kwargs, prefix=prefix, weights=now.weights)
    if now.role == "training" and now.outputs is not None:
        now.outputs.append(tree_map_only(Tensor, Tensor.detach, output))
    return output


class Alike(BaseException):  # not an Exception: a closure may catch these
    """The gates of the two passes differ for few samples or none: ``rows`` are their indices."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


def _compare(net: PlasticNet, now: Pass) -> None:
    """Raise `Alike` if it pays and is exact to compute only the samples whose gates differ: when samples do
    not interact, and nothing is left in buffers. Not asked of a GPU, which would mean waiting for it."""
    draw, estimator = now.step.draw, ESTIMATORS[net.estimator]
    assert draw is not None
    if net._weights() or draw.u.is_cuda or estimator.partners != 1 or estimator.slopes is not None or now.running:
        return
    differ = (estimator.gates(draw, 0) != estimator.gates(draw, 1)).any(1)
    rows = differ.nonzero().squeeze(1)
    apart = (
        draw.rows > 1
        and net._samples_apart
        and net._rows_apart is not False
        and not any(True for _ in net.model.buffers())
    )
    if not len(rows) or (apart and 2 * len(rows) <= draw.rows):
        raise Alike(rows)


def _some_rows(net: PlasticNet, now: Pass, z: Tensor, args: Any, kwargs: Any, before: Any) -> Any:
    """The output of the training pass, computed anew for some of the samples. Raises `Diverged` where the
    samples cannot be told."""
    inputs, outputs = tensors_within((args, kwargs)), tree_leaves(before)
    rows = now.rows
    assert rows is not None
    if len(inputs) != 1 or not all(isinstance(t, Tensor) and t.dim() and len(t) == len(z) for t in (*inputs, *outputs)):
        raise Diverged
    args, kwargs = tree_map_only(Tensor, lambda t: t[rows], (args, kwargs))
    output = net._run(z[rows], args, kwargs)
    return tree_map(lambda old, new: old.index_copy(0, rows, new), before, output)


def _gates(net: PlasticNet, now: Pass, args: Any, kwargs: Any) -> Tensor:
    """The gates of this call, shape (rows, units + 1); those of single weights are noted in the pass."""
    if now.role == "probe":
        assert now.probe is not None
        return now.probe(batch_size(args, kwargs))
    step, estimator = now.step, ESTIMATORS[net.estimator]
    rows = batch_size(args, kwargs) if draws_per_sample(net) else 1
    if step.draw is None:
        step.draw = _draw(net, rows)
        if net._weights():
            step.draw, step.weights = _with_weights(net, step.draw)
        step.after = RandomState(net.model)
    elif step.draw.rows != rows:
        raise PlasticError(
            f"the closure called the network on batches of {step.draw.rows} and of {rows}; gates are drawn once for "
            'both, so construct PlasticNet with gates="batch"'
        )
    elif now.calls == 0:
        assert step.after is not None
        step.after.restore()
    if now.z is None:
        gates = now.gates or (lambda draw: estimator.gates(draw, 0))
        z = gates(step.draw)
        with torch.set_grad_enabled(z.requires_grad or torch.is_grad_enabled()):
            now.z = torch.cat([z, z.new_ones(len(z), 1)], 1)
        if step.weights is not None:
            parts = gates(step.weights)[0].split([w.phi.numel() for w in net._weights()])
            now.weights = {w.name: g.view(w.phi.shape) for w, g in zip(net._weights(), parts, strict=True)}
    return now.z


def _draw(net: PlasticNet, rows: int) -> Draw:
    if not net._sites():
        nothing = net._like.new_zeros(0)
        return ESTIMATORS[net.estimator].draw(nothing, nothing, rows)
    pi = probabilities(net._sites(), net.k).detach()
    sizes = torch.cat([torch.full_like(s.phi.detach(), len(s)) for s in net._sites()])
    return ESTIMATORS[net.estimator].draw(pi, sizes, rows, mixed(net, rows))


def _with_weights(net: PlasticNet, units: Draw) -> tuple[Draw, Draw]:
    """The draw for the units, and one for single weights, which the batch shares. Of the units or the weights one kind
    is flipped in a step: a coin says which."""
    pi = torch.cat([w.probability(net.k).detach().flatten() for w in net._weights()])
    sizes = torch.cat([w.phi.new_full((w.phi.numel(),), w.phi.numel()) for w in net._weights()]).detach()
    weights = ESTIMATORS[net.estimator].draw(pi, sizes, 1)
    if units.chosen is None or weights.chosen is None:
        return units, weights
    coin = bool(torch.rand((), device="cpu") < 0.5)
    return units.flipping(coin), weights.flipping(not coin)


def shared(net: PlasticNet) -> Tensor:
    """Which gates the whole batch shares in any case, a boolean mask of shape (units,)."""
    return torch.cat(
        [torch.full((len(s),), not net._gating.per_sample[s.name], device=s.phi.device) for s in net._sites()]
    )


def mixed(net: PlasticNet, rows: int) -> Tensor | None:
    """`shared`, where others draw once for each of some rows; else None."""
    return shared(net) if rows > 1 and not all(net._gating.per_sample.values()) else None


def draws_per_sample(net: PlasticNet) -> bool:
    """Whether every sample gets gates of its own."""
    if net.gates_mode == "batch" or not any(net._gating.per_sample.values()):
        return False
    if net.gates_mode == "sample":
        return True
    return bool(net._samples_apart) and not uses_batch_statistics(net.model)


def run(net: PlasticNet, closure: Callable[[], Tensor], now: Pass) -> Tensor:
    """The losses that the closure gives in this pass. Raises `PlasticError` where they are none."""
    net._pass = now
    try:
        with running_statistics(net.model) if now.running else nullcontext():
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
