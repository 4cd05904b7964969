"""Computes the expected loss over the gates from the passes of one training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import probabilities
from plasticnet.gates.wrapped import enter
from plasticnet.learning.alike import Alike
from plasticnet.learning.closing import measure_missed
from plasticnet.learning.coupling import Draw
from plasticnet.learning.draws import draws_per_sample, gates_of_pass
from plasticnet.learning.estimate import Scaled, estimate, surrogate, training_gates
from plasticnet.learning.finite import check_logits
from plasticnet.learning.guard import guarded
from plasticnet.learning.passes import ByBatch, run_aside, run_closure, run_replaying
from plasticnet.learning.prefix import Diverged, Prefix
from plasticnet.learning.probe import resolve_auto
from plasticnet.learning.sampler import Pass, Sampler, Step
from plasticnet.tools.precision import widened
from plasticnet.tools.snapshot import Snapshot
from plasticnet.tools.statistics import compares_running


def expected_loss(net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor]) -> Tensor:
    """Return the training loss, a scalar whose backward pass also gives the gates their gradient.

    This is `PlasticNet.expected_loss`. If anything is raised, random numbers and buffers are put back to what they were
    before, so that a bad batch does not ruin the statistics of BatchNorm. Other threads that call or change the network
    wait.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        closure: A function that runs the network and returns the losses of the samples, shape (batch,), or their mean.

    Raises:
        PlasticError: The network is in evaluation mode, its gates are not finite, modules of the model were replaced,
            or the closure does not return usable losses.
    """
    with net.lock:
        if not net.training:
            raise PlasticError("expected_loss needs training mode; call net.train() first")
        if not callable(closure):
            raise PlasticError(
                f"expected_loss takes a function that runs the network, not a {type(closure).__name__}: "
                "net.expected_loss(lambda: loss_of(net(x), y))"
            )
        if sampler.running.role != "free":
            raise PlasticError(
                "expected_loss was called in the closure of expected_loss; call net(x) there. Where a callback makes "
                "an expected loss of a training step that takes it by itself, tell the callback so: expected=True"
            )
        net.check()
        check_logits(net, sampler)
        enter(net)
        before, apart = Snapshot(net.model), sampler.samples_apart
        try:
            return guarded(net, _estimated(net, sampler, closure, before))
        except BaseException:
            before.restore()
            sampler.samples_apart = apart  # a bad batch says nothing of the others
            raise


def _estimated(net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor], before: Snapshot) -> Tensor:
    """Return the training loss: the plain mean loss where no gate is uncertain, else with the gradient of the gates."""
    if 0 < net.k < math.inf:  # The random numbers of a step depend on the answer, also where no gate is uncertain.
        resolve_auto(net, sampler, closure)
    if net.k == 0 or math.isinf(net.k) or not _uncertain(net):
        now = Pass("training")
        f = run_closure(net, sampler, closure, now)
        _check_graph(net, f)
        if sampler.missed is not None:
            measure_missed(net, sampler, closure, before, now.step, f)
        return f.mean() if f.dim() else f
    step = Step(gradients=torch.is_grad_enabled())
    try:
        f, gradient = _passes(net, sampler, closure, before, step)
    except ByBatch:
        before.restore()
        sampler.samples_apart = False
        step = Step(gradients=torch.is_grad_enabled())
        f, gradient = _passes(net, sampler, closure, before, step)
    _check_graph(net, f)
    if sampler.missed is not None:
        measure_missed(net, sampler, closure, before, step, f)
    sampler.estimates += step.gradients
    step.gradient = net.ranks.average(gradient)
    loss = widened(f).mean() + surrogate(net, step.gradient)
    if sampler.rule.at != "training":
        sampler.gradient = step.gradient
        return loss
    # All gates are made part of the loss, whether they were used or not. On a rank whose blocks are closed, the
    # backward pass would otherwise not reach the gates, and the other ranks would wait for its slopes.
    tied = [0 * z.sum() for z in step.gated]
    step.gated.clear()  # the graph of these gates refers to the step: this breaks the cycle
    scaled = Scaled.apply(loss + sum(tied), step)
    assert isinstance(scaled, Tensor)
    return scaled


def _check_graph(net: GatedModel, f: Tensor) -> None:
    """Raise `PlasticError` where gradients are wanted and the losses have none to give."""
    if torch.is_grad_enabled() and not f.requires_grad and any(p.requires_grad for p in net.model.parameters()):
        raise PlasticError(
            "the losses that the closure returned have no graph, so that nothing would learn: it detaches them, or "
            "calls the network under torch.no_grad(). Put torch.no_grad() around expected_loss if no gradient is wanted"
        )


def _passes(
    net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor], before: Snapshot, step: Step
) -> tuple[Tensor, Tensor]:
    """Run all passes of a step.

    The training pass comes last. It is handed what the others have computed before the first gate.

    Returns:
        The losses to train on, shape (batch,) or a scalar; and the estimate for all logits, as far as it is known
        before the backward pass.
    """
    estimator = sampler.rule
    running = draws_per_sample(net, sampler) and compares_running(net.model)
    indices = [i for i in estimator.reads if running or i]
    # What FSDP2 gathers within a pass is freed after it, and all ranks must run the same passes.
    handed = indices and not sampler.differentiates and not net.ranks.sharded
    step.prefix = _prefix(net) if handed else None
    found: dict[int, Tensor] = {}
    slopes: list[Tensor] = []
    try:
        for i in indices:
            now = Pass("partner", step, gates_of_pass(sampler, i), running)
            found[i] = run_replaying(net, before, now, partial(run_aside, net, sampler, closure, after=before))
        if running:  # the training pass uses the statistics of the batch, so its prefix is another one
            step.prefix = None
        if estimator.at == "mean":
            slopes = _slopes_at_mean(net, sampler, closure, step, before)
        training = Pass("training", step, partial(training_gates, net, sampler, step))
        f = run_replaying(net, before, training, partial(run_closure, net, sampler, closure))
    except Alike as alike:
        before.restore()
        f, found[1] = _nearly_equal(net, sampler, closure, before, step, alike.rows)
    found.setdefault(0, f.detach())
    losses = [found.get(i, found[0]) for i in range(estimator.partners + 1)]
    return f, estimate(net, sampler, step, losses, slopes)


def _prefix(net: GatedModel) -> Prefix:
    """Return an empty record for what a run of the model computes before its first gate."""
    return Prefix(net.model, {id(t): t for t in net.gating.known}, keep=net.gating.keep_results)


def _slopes_at_mean(
    net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor], step: Step, before: Snapshot
) -> list[Tensor]:
    """Return the slopes at the mean gates, z = pi, of shape (rows, units), for every draw of the step."""
    leaves: dict[int, Tensor] = {}

    def gates(draw: Draw) -> Tensor:
        leaves[id(draw)] = draw.pi.expand(draw.rows, -1).clone().requires_grad_()
        return leaves[id(draw)]

    f = run_replaying(net, before, Pass("partner", step, gates), partial(run_closure, net, sampler, closure))
    slopes = torch.autograd.grad(f.mean(), [leaves[id(draw)] for draw in step.draws], materialize_grads=True)
    before.restore()
    return list(slopes)


def _nearly_equal(
    net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor], before: Snapshot, step: Step, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the training pass first, and the partner only for the samples whose gates differ.

    The first time the partner is also run on all samples, and both results are compared. The network is run on some of
    the samples again only where they agree.

    Args:
        net: The network.
        sampler: How its gates are drawn; it remembers in ``rows_apart`` what the comparison has shown.
        closure: The closure of the step.
        before: Random numbers and buffers at the start of the step.
        step: The step, whose draw was made.
        rows: The indices of the samples whose gates differ.

    Returns:
        The losses of the training pass, and those of the partner.
    """
    step.prefix = None
    training = Pass("training", step, outputs=[])
    f1 = run_closure(net, sampler, closure, training)
    if not len(rows):
        return f1, f1.detach()
    gates = gates_of_pass(sampler, 1)
    after, f2 = Snapshot(net.model), None
    if after.random == step.after:  # if not, there is dropout, whose mask depends on the number of samples
        before.restore()
        partner = Pass("partner", step, gates, outputs=training.outputs, rows=rows)
        try:
            f2 = run_aside(net, sampler, closure, partner, after=after, before=before)
        except (Diverged, Exception):  # the network cannot be run on some of the samples
            f2 = None
    if f2 is None:
        sampler.rows_apart = False
    if f2 is None or sampler.rows_apart is None:  # the first time, check that this is exact
        before.restore()
        whole = run_aside(net, sampler, closure, Pass("partner", step, gates), after=after, before=before)
        if f2 is not None and not torch.equal(whole, f1):  # equal losses would show nothing
            sampler.rows_apart = torch.allclose(widened(f2), widened(whole), rtol=1e-4, atol=1e-6)
        f2 = f2 if f2 is not None and sampler.rows_apart else whole
    return f1, f2


def _uncertain(net: GatedModel) -> bool:
    """Return whether any gate can differ between two draws; on a GPU always True, to save waiting for its answer."""
    if net.like.is_cuda:
        return True
    pi = probabilities(net.all_gates(), net.k)
    return bool(((pi > 0) & (pi < 1)).any())
