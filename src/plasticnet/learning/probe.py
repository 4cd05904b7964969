"""The probe of ``gates="auto"``: whether gates can be drawn per sample without bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.learning.draws import shared
from plasticnet.learning.passes import run_aside
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.snapshot import RandomState
from plasticnet.tools.statistics import uses_batch_statistics


def resolve_auto(net: GatedModel, sampler: Sampler, closure: Callable[[], Tensor]) -> None:
    """Find out once whether gates can be drawn per sample: the closure returns (batch,), and the
    loss of a sample does not move when the gates of others do."""
    if sampler.mode != "auto" or sampler.samples_apart is not None or uses_batch_statistics(net.model):
        return
    try:
        reference = run_aside(net, sampler, closure, Pass("probe", probe=lambda rows: _all_open(net, rows)))
    except PlasticError:  # a layer's rows are not the samples; whatever else is wrong will be said again
        sampler.samples_apart = False
        return
    if reference.dim() and len(reference) < 2:
        return  # one sample says nothing about two: ask the next batch
    if not reference.dim() or not any(net.gating.per_sample.values()):
        sampler.samples_apart = False
        return
    try:
        moved = run_aside(net, sampler, closure, Pass("probe", probe=lambda rows: _half_random(net, rows)))
    except PlasticError:  # rows that are not samples, or a loss that overflows: one draw per batch is safe
        sampler.samples_apart = False
        return
    half = len(reference) // 2
    if torch.equal(reference[:half], moved[:half]):
        return  # nothing moves (a head that starts at zero): ask the next batch
    sampler.samples_apart = torch.allclose(reference[half:], moved[half:], rtol=1e-4, atol=1e-6)


def _all_open(net: GatedModel, rows: int) -> Tensor:
    units = sum(len(s) for s in net.sites.values())
    return torch.ones(rows, units + 1, device=net.like.device)


def _half_random(net: GatedModel, rows: int) -> Tensor:
    """Random gates for the first half of the rows; those of the other half are open."""
    z, before = _all_open(net, rows), RandomState(net.model)
    half, units = rows // 2, z.shape[1] - 1
    z[:half, :-1] = torch.where(shared(net), 1.0, torch.rand(half, units, device=z.device).round())
    before.restore()  # the network's own dropout is the same in both probes
    return z
