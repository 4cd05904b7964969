"""Closes single units in a training step, to measure by how much they are missed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plasticnet.gates.gated import GatedModel
from plasticnet.learning.draws import draws_per_sample
from plasticnet.learning.passes import run_aside
from plasticnet.learning.sampler import Pass, Sampler, Step
from plasticnet.tools.precision import widened
from plasticnet.tools.snapshot import RandomState, Snapshot
from plasticnet.tools.statistics import compares_running


def measure_missed(
    net: GatedModel,
    sampler: Sampler,
    closure: Callable[[], Tensor],
    before: Snapshot,
    step: Step,
    losses: Tensor,
) -> None:
    """Measure in a training step how much units are missed; the step goes on as if nothing had been run.

    Args:
        net: The network.
        sampler: How its gates are drawn, and what is measured.
        closure: The closure of the step.
        before: Random numbers and buffers at the start of the step.
        step: The step, whose training pass has run.
        losses: What that pass has returned, shape (batch,) or a scalar.
    """
    missed = sampler.missed
    assert missed is not None
    if not missed.fits(net):  # Somebody has resized the network within the epoch.
        missed.steps += 1
        return
    missed.to(losses.device)
    after = Snapshot(net.model)
    gates, all_open = net.mean_gates()
    running = compares_running(net.model)

    def losses_without(places: Tensor | None) -> Tensor:
        before.restore()
        called = _Closing(gates, None if places is None else missed.units[places], step.after)
        now = Pass("probe", running=running, probe=called)
        return run_aside(net, sampler, closure, now, after=after, before=before)

    try:
        apart = losses.dim() == 1 and draws_per_sample(net, sampler) and all(net.gating.per_sample.values())
        base = losses.detach() if all_open and not running and not net.weights else losses_without(None)
        if apart:
            places = missed.take(len(losses))
            try:
                closed = losses_without(places)
            except _OtherRows:
                apart = False
            else:
                apart = closed.shape == base.shape
                if apart:
                    missed.note(places, widened(base), widened(closed))
        if not apart:
            places = missed.take(1)
            closed = losses_without(places)
            missed.note(places, widened(base).mean().reshape(1), widened(closed).mean().reshape(1))
    finally:
        after.restore()


class _OtherRows(Exception):
    """Says that the network is called with another number of samples than there are losses."""


class _Closing:
    """Gives a call of the network its gates, in which a unit is closed in each row.

    Args:
        gates: The gates of all units, shape (units + 1,), with a constant 1 at the end.
        closed: The unit that is closed in each row, shape (rows,); a single one is closed in the whole batch, and None
            stands for none.
        after: The random numbers after the draw of the step, with which its passes go on, for the same dropout.
    """

    def __init__(self, gates: Tensor, closed: Tensor | None, after: RandomState | None) -> None:
        self.gates, self.closed, self.after = gates, closed, after

    def __call__(self, rows: int) -> Tensor:
        """Return the gates for so many samples, shape (rows, units + 1) or (1, units + 1)."""
        if self.after is not None:
            self.after.restore()
            self.after = None
        if self.closed is None:
            return self.gates[None]
        if len(self.closed) > 1 and rows != len(self.closed):
            raise _OtherRows
        z = self.gates.repeat(len(self.closed), 1)
        z[torch.arange(len(z), device=z.device), self.closed] = 0.0
        return z
