"""Runs the closure once: it makes the network use the gates of the pass, and checks the losses that come out."""

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
from plasticnet.gates.wrapped import enter, meet, tied
from plasticnet.learning.alike import check_alike, some_rows
from plasticnet.learning.draws import gates_of_call
from plasticnet.learning.prefix import Diverged
from plasticnet.learning.replay import Player, Recorder
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.snapshot import Snapshot, left_as_it_was
from plasticnet.tools.statistics import running_statistics
from plasticnet.tools.trees import tensors_within


def call(net: GatedModel, sampler: Sampler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the network, as `PlasticNet.forward` does, and return its output.

    In training at finite k the gates are drawn, and a probe gives gates of its own. Else the gates are at their mean.

    Args:
        net: The network.
        sampler: How its gates are drawn, and which pass is running.
        args: The positional arguments for the model.
        kwargs: The keyword arguments for the model.
    """
    now = sampler.running
    if net.training:
        meet(net)
        if now.role == "free":  # for its own passes `expected_loss` has done this already
            enter(net)
    if now.role == "probe" or (net.training and not math.isinf(net.k)):
        return tied(net, _drawn(net, sampler, args, kwargs))
    z, all_open = net.mean_gates()
    now.note(args, kwargs)
    output = net.run(z, args, kwargs, all_open=all_open, weights=net.mean_weights())
    return tied(net, output) if net.training else output


def _drawn(net: GatedModel, sampler: Sampler, args: Any, kwargs: Any) -> Any:
    """Run the network under gates that are drawn, as a call within the pass that is running, and return its output."""
    now = sampler.running
    if now.role == "free":
        now = Pass()
    z = gates_of_call(net, sampler, now, args, kwargs)
    number = now.calls
    now.note(args, kwargs)
    if now.rows is not None:
        return some_rows(net, now, z, args, kwargs, (now.outputs or [])[number])
    watching, recorded = None, now.step.prefix
    if recorded is not None and number == 0:  # before any later call, gates have already acted
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
    """Run the closure as the given pass.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        closure: The function that runs the network and returns its losses.
        now: What this run is for.

    Returns:
        The losses that the closure returned, shape (batch,) or a scalar.

    Raises:
        PlasticError: The closure never calls the network or returns something else, or a loss is not finite.
    """
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
    """Run a pass; if the results that it was handed do not fit, run it once more and hand it nothing.

    Args:
        net: The network.
        before: Random numbers and buffers at the start of the step, which are put back before the second run.
        now: The pass.
        run: What runs the closure as a given pass and returns the losses.
    """
    prefix = now.step.prefix
    try:
        return run(now)
    except (Diverged, RuntimeError) as error:
        # The closure may read a tensor without content outside of the call, and TorchScript makes an error of its own.
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
    """Return the losses of a pass that runs without gradients and leaves nothing behind.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        closure: The function that runs the network and returns its losses.
        now: What this run is for.
        after: The state of random numbers and buffers in which the run leaves them. None leaves them as they were.
    """
    with left_as_it_was(net.model, after=after):
        return run_closure(net, sampler, closure, now).detach()


def _check_losses(f: Any, now: Pass) -> None:
    """Raise `PlasticError` unless the closure called the network and returned losses per sample, or their mean."""
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
    """Raise `PlasticError` when a loss is not finite.

    A GPU is not waited for: its answer is read when it has arrived, at one of the next calls.
    """
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
