"""One run of the closure: the calls of the network in it, and the losses that it gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.wrapped import enter
from plasticnet.learning.alike import check_alike, some_rows
from plasticnet.learning.draws import gates_of_call
from plasticnet.learning.prefix import Diverged
from plasticnet.learning.replay import Player, Recorder
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.snapshot import Snapshot, left_as_it_was
from plasticnet.tools.statistics import running_statistics
from plasticnet.tools.trees import tensors_within


def call(net: GatedModel, sampler: Sampler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the network returns: under gates that are drawn in training at finite k, and under those that a probe
    gives; else with the gates at their mean."""
    now = sampler.running
    if net.training and now.role == "free":  # `expected_loss` has done so for its passes
        enter(net)
    if now.role == "probe" or (net.training and not math.isinf(net.k)):
        return _drawn(net, sampler, args, kwargs)
    z, all_open = net.mean_gates()
    now.note(args, kwargs)
    return net.run(z, args, kwargs, all_open=all_open, weights=net.mean_weights())


def _drawn(net: GatedModel, sampler: Sampler, args: Any, kwargs: Any) -> Any:
    """Run the network under gates that are drawn, as one call of the pass that is running."""
    now = sampler.running
    if now.role == "free":
        now = Pass()
    z = gates_of_call(net, sampler, now, args, kwargs)
    number = now.calls
    now.note(args, kwargs)
    if now.rows is not None:
        return some_rows(net, now, z, args, kwargs, (now.outputs or [])[number])
    watching, recorded = None, now.step.prefix
    if recorded is not None and number == 0:  # before later calls gates have acted
        if not recorded.inputs:
            if now.role == "partner":
                check_alike(net, sampler, now)
                recorded.inputs = tensors_within((args, kwargs))
                watching = partial(Recorder, recorded)
        elif recorded.replays((args, kwargs), last=now.role == "training"):
            watching = partial(Player, recorded, last=now.role == "training")
    output = net.run(z, args, kwargs, watching=watching, weights=now.weights)
    if now.role == "training" and now.outputs is not None:
        now.outputs.append(tree_map_only(Tensor, Tensor.detach, output))
    return output


def run_closure(net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor], now: Pass) -> Tensor:
    """The losses that the closure gives in this pass. Raises `PlasticError` where it gives none."""
    sampler.running = now
    try:
        with running_statistics(net.model) if now.running else nullcontext():
            f = closure()
    finally:
        sampler.running = Pass()
    _check_losses(f, now)
    _check_finite(sampler, f.detach())
    return f


def run_replaying(net: GatedModel, before: Snapshot, now: Pass, run: Callable[[Pass], Tensor]) -> Tensor:
    """Run a pass; if what it was handed does not fit, run it once more and hand it nothing."""
    prefix = now.step.prefix
    try:
        return run(now)
    except (Diverged, RuntimeError) as error:
        # A tensor without content that was read outside of the call, or in TorchScript, which makes its own error.
        empty = prefix is not None and prefix.dropped and ("meta" in str(error) or "Diverged" in str(error))
        if not (isinstance(error, Diverged) or empty):
            raise
    net.gating.keep_results = True
    now.step.prefix = None
    before.restore()
    return run(Pass(now.role, now.step, now.gates, now.running))


def run_aside(
    net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor], now: Pass, after: Snapshot | None = None
) -> Tensor:
    """The losses of a pass without gradients. Afterwards everything is in the state ``after``, or as it was."""
    with left_as_it_was(net.model, after=after):
        return run_closure(net, sampler, closure, now).detach()


def _check_losses(f: Any, now: Pass) -> None:
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


def _check_finite(sampler: Sampler, f: Tensor) -> None:
    """Raise `PlasticError` when a loss is not finite. The answer of a GPU is not waited for: it is read one of the
    next times."""
    finite = torch.isfinite(f).all()
    answers = [finite]
    if f.is_cuda:
        come, answer = torch.cuda.Event(), torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(finite, non_blocking=True)
        come.record()
        sampler.owed.append((come, answer))
        answers = []
        while sampler.owed and sampler.owed[0][0].query():
            answers.append(sampler.owed.pop(0)[1])
    if not all(answers):
        sampler.owed.clear()
        raise PlasticError("the loss is not finite (NaN or infinite); lower the learning rate or check the data")
