"""Runs the closure once: it makes the network use the gates of the pass, and checks the losses that come out."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from plasticnet.errors import PlasticError
from plasticnet.gates.checkpoints import checkpoints_by
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.wrapped import enter, meet, tied
from plasticnet.learning.alike import check_alike, some_rows
from plasticnet.learning.draws import gates_of_call
from plasticnet.learning.finite import check_logits, check_loss
from plasticnet.learning.prefix import Diverged
from plasticnet.learning.replay import Player, Recorder
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.gradients import outside_inference_mode, wants_gradients
from plasticnet.tools.snapshot import Snapshot, left_as_it_was
from plasticnet.tools.statistics import running_statistics
from plasticnet.tools.trees import tensors_within


class ModeChanged(PlasticError):
    """A closure has left the network in another mode, or at another k."""


class _Running(threading.local):
    """How many closures of `expected_loss` this thread runs, one within the other."""

    closures = 0


_RUNNING = _Running()


def call(net: GatedModel, sampler: Sampler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the network, as `PlasticNet.forward` does, and return its output.

    In training at finite k the gates are drawn, and a probe gives gates of its own. Else the gates are at their mean.

    Args:
        net: The network.
        sampler: How its gates are drawn, and which pass is running.
        args: The positional arguments for the model.
        kwargs: The keyword arguments for the model.
    """
    with net.lock:
        return _called(net, sampler, args, kwargs)


def _called(net: GatedModel, sampler: Sampler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the network, as `call` does, while this thread has its lock."""
    now = sampler.running
    if now.role == "free" and not torch.compiler.is_dynamo_compiling():
        net.check()
    if net.training:
        meet(net)
        if now.role == "free":  # for its own passes `expected_loss` has done this already
            enter(net)
            if not torch.compiler.is_dynamo_compiling():
                check_logits(net, sampler)
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
        if _RUNNING.closures and net.k and torch.is_grad_enabled():
            raise PlasticError(
                "another plastic network is called in the closure of expected_loss, so that its gates would get no "
                "gradient. Take the expected losses of both, one within the other: "
                "a.expected_loss(lambda: b.expected_loss(lambda: ...)); or put the other one into evaluation mode, "
                "under torch.no_grad, or at k = 0 or infinity"
            )
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
    mode, free = (net.training, net.k), Pass()
    _RUNNING.closures += 1
    try:
        with (
            checkpoints_by(partial(_again, net, sampler, now, net.lock.hold)),
            running_statistics(net.model) if now.running else nullcontext(),
        ):
            f = closure()
    finally:  # Python lets no interrupt in where nothing is called
        _RUNNING.closures -= 1
        sampler.running = free
    if (net.training, net.k) != mode:
        raise ModeChanged(
            "the closure of expected_loss has changed the mode or the k of the network, as net.eval() does, and so its "
            "passes cannot be compared; change them outside of the closure, or back before it ends"
        )
    _check_losses(net, sampler, f, now)
    check_loss(sampler, f.detach())
    return f


def _again(net: GatedModel, sampler: Sampler, now: Pass, hold: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a checkpoint in the closure, around a call of the network, runs again in the backward pass.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        now: The pass that is running.
        hold: Which hold of the network's lock this is.
        function: What the checkpoint would run.
    """
    calls = now.calls
    if not calls:  # What the checkpoint keeps of the first run must be all that it keeps of the second one.
        now.step.prefix = None

    def run(*args: Any, **kwargs: Any) -> Any:
        with net.lock.again(hold):
            before, sampler.running = sampler.running, replace(now, calls=calls, outputs=None)
            try:
                return function(*args, **kwargs)
            finally:
                sampler.running = before

    return run


@contextmanager
def changing(net: GatedModel, sampler: Sampler) -> Iterator[None]:
    """Let nothing else run or change the network while its sizes change within this context.

    Within it `torch.inference_mode` is off.

    Raises:
        PlasticError: A closure of `expected_loss` is running, whose passes must all have the same sizes; or modules of
            the model were replaced.
    """
    with net.lock, outside_inference_mode():
        if sampler.running.role != "free":
            raise PlasticError(
                "the sizes of the network cannot change in the closure of expected_loss; do it afterwards"
            )
        net.check(values=False)
        yield


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
    net: GatedModel,
    sampler: Sampler,
    closure: Callable[[], Tensor],
    now: Pass,
    after: Snapshot | None = None,
    before: Snapshot | None = None,
) -> Tensor:
    """Return the losses of a pass that leaves nothing behind.

    It runs without gradients unless the closure takes a gradient itself, as a model of forces does.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        closure: The function that runs the network and returns its losses.
        now: What this run is for.
        after: The state of random numbers and buffers in which the run leaves them. None leaves them as they were.
        before: Their state now, where ``after`` is another one.
    """
    if not sampler.differentiates:
        try:
            with left_as_it_was(net.model, after=after):
                return run_closure(net, sampler, closure, now).detach()
        except Exception as error:
            if not wants_gradients(error):
                raise
        sampler.differentiates = True
        if before is not None:
            before.restore()
        now = now.anew()
    now.step.prefix = None  # The closure may release the graph of what was recorded.
    with left_as_it_was(net.model, after=after), torch.enable_grad():
        return run_closure(net, sampler, closure, now).detach()


class ByBatch(Exception):
    """Says that the losses are not those of the samples, so that the batch must share its gates."""


def _check_losses(net: GatedModel, sampler: Sampler, f: Any, now: Pass) -> None:
    """Raise `PlasticError` unless the closure called the network and returned losses, or their mean.

    Raises:
        ByBatch: Gates were drawn per sample because of earlier losses, and these are not one for each sample.
    """
    if now.calls == 0:
        raise PlasticError("the closure never called the network; compute the loss from net(x), not from net.model(x)")
    if isinstance(f, Tensor) and not f.numel():
        raise PlasticError(
            f"the closure returned no losses (shape {tuple(f.shape)}), as of a batch without samples; leave empty "
            "batches out"
        )
    if not isinstance(f, Tensor) or f.dim() > 1 or not f.is_floating_point():
        what = f"a tensor of shape {tuple(f.shape)} and {f.dtype}" if isinstance(f, Tensor) else f"a {type(f).__name__}"
        raise PlasticError(
            f"the closure returned {what}; it must return the losses of the samples, shape (batch,), "
            "or their mean, a scalar"
        )
    if sampler.mode == "sample" and f.dim() and len(f) not in {*now.sizes, now.calls * max(now.sizes, default=0)}:
        raise PlasticError(
            f'the closure returned losses of shape {tuple(f.shape)}, which is not (batch,). With gates="sample" they '
            'must be one per sample; for losses per graph, token or pair, construct PlasticNet with gates="batch"'
        )
    draw = now.step.draw
    if sampler.mode == "auto" and draw is not None and draw.rows > 1 and f.shape != (draw.rows,):
        raise ByBatch
