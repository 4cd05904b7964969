"""Probes, for ``gates="auto"``, whether gates can be drawn per sample without bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.learning.draws import shared
from plasticnet.learning.passes import ModeChanged, run_aside
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.precision import widened
from plasticnet.tools.snapshot import RandomState
from plasticnet.tools.statistics import uses_batch_statistics


def resolve_auto(net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor]) -> None:
    """Find out whether gates can be drawn per sample, and store the answer in ``sampler.samples_apart``.

    They can be if the closure returns one loss per sample, and not per graph, token or pair, and if the loss of a
    sample does not change when the gates of other samples do. Where a batch shows nothing, the next batch is asked.
    With statistics of the batch nothing is run.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        closure: The closure of the training step, which is run twice without leaving anything behind.
    """
    if sampler.mode != "auto" or sampler.samples_apart is not None or uses_batch_statistics(net.model):
        return
    _probe(net, sampler, closure)
    if net.ranks.sharded:  # All ranks must run the same passes, in this step and in later ones.
        answers = net.ranks.everywhere(sampler.samples_apart)
        sampler.samples_apart = False if False in answers else None if None in answers else True


def _probe(net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor]) -> None:
    """Do what `resolve_auto` does, on this rank."""
    calls: list[int] = []

    def opened(rows: int) -> Tensor:
        calls.append(rows)
        return _all_open(net, rows)

    try:
        reference = run_aside(net, sampler, closure, Pass("probe", probe=opened))
    except ModeChanged:
        raise
    except PlasticError:  # a layer's rows are not the samples; any other error will be raised again by the step itself
        sampler.samples_apart = False
        return
    each = reference.dim() and all(rows == len(reference) for rows in calls)
    samples = len(reference) if each else 2
    if (min(net.ranks.everywhere(samples)) if net.ranks.sharded else samples) < 2:
        return  # a single sample shows nothing about two: ask the next batch
    if not each or not any(net.gating.per_sample.values()):
        sampler.samples_apart = False
        return
    try:
        moved = run_aside(net, sampler, closure, Pass("probe", probe=lambda rows: _half_random(net, rows)))
    except ModeChanged:
        raise
    except PlasticError:  # rows are not samples, or a loss overflows: one draw per batch is always safe
        sampler.samples_apart = False
        return
    if moved.shape != reference.shape:  # what the losses are of depends on the outputs
        sampler.samples_apart = False
        return
    half = len(reference) // 2
    if torch.equal(reference[:half], moved[:half]):
        return  # nothing changes, as with a head that starts at zero: ask the next batch
    sampler.samples_apart = torch.allclose(widened(reference[half:]), widened(moved[half:]), rtol=1e-4, atol=1e-6)


def _all_open(net: GatedModel, rows: int) -> Tensor:
    """Return gates that are all 1, but for what sleeps, shape (rows, units + 1)."""
    z = torch.ones(rows, len(net.cost.awake) + 1, device=net.like.device)
    z[:, :-1] = net.cost.awake
    return z


def _half_random(net: GatedModel, rows: int) -> Tensor:
    """Return gates that are random in the first half of the rows and open in the other, shape (rows, units + 1)."""
    z, before = _all_open(net, rows), RandomState(net.model)
    half, units = rows // 2, z.shape[1] - 1
    z[:half, :-1] = torch.where(shared(net), z[:half, :-1], torch.rand(half, units, device=z.device).round())
    before.restore()  # so that the network's own dropout is the same in both probes
    return z
