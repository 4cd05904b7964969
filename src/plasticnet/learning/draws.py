"""Gives every call of the network its gates: they are drawn once for each step, per sample or per batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import probabilities
from plasticnet.learning.coupling import Draw
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.inputs import batch_size
from plasticnet.tools.snapshot import RandomState
from plasticnet.tools.statistics import uses_batch_statistics


def gates_of_call(net: GatedModel, sampler: Sampler, now: Pass, args: Any, kwargs: Any) -> Tensor:
    """Return the gates of the units for this call of the network.

    The first call of a step makes the draw, and all later calls of its passes use it. The gates of single weights are
    stored in ``now.weights``.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        now: The pass that is running.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.

    Returns:
        The gates, shape (rows, units + 1), with a constant 1 at the end of each row. There is one row for each sample,
        or a single row that the batch shares.

    Raises:
        PlasticError: Gates are drawn per sample, and the step calls the network on batches of different sizes.
    """
    if now.role == "probe":
        assert now.probe is not None
        return now.probe(_rows(args, kwargs))
    # The weights are listed, because torch.compile takes every mapping proxy to be full.
    step, weights = now.step, list(net.weights.values())
    rows = _rows(args, kwargs) if draws_per_sample(net, sampler) else 1
    if step.draw is None:
        with torch.no_grad():  # so that nothing is kept for a backward pass here, and a checkpoint need not repeat it
            step.draw = _draw_units(net, sampler, rows)
            if weights:
                step.draw, step.weights = _with_weights(net, sampler, step.draw)
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
        gates = now.gates or gates_of_pass(sampler, 0)
        z = gates(step.draw)
        with torch.set_grad_enabled(z.requires_grad or torch.is_grad_enabled()):
            now.z = torch.cat([z, z.new_ones(len(z), 1)], 1)
        if step.weights is not None:
            parts = gates(step.weights)[0].split([w.phi.numel() for w in weights])
            now.weights = {w.name: g.view(w.phi.shape) for w, g in zip(weights, parts, strict=True)}
    return now.z


def _rows(args: Any, kwargs: Any) -> int:
    """Return how many rows of gates a call needs that has some for each sample: one, too, for an empty batch."""
    return max(1, batch_size(args, kwargs))


def gates_of_pass(sampler: Sampler, i: int) -> Callable[[Draw], Tensor]:
    """Return a function that gives the gates of the estimator's pass ``i``, shape (rows, units), for a draw."""
    gates = sampler.rule.gates
    return lambda draw: gates(draw, i)


def _draw_units(net: GatedModel, sampler: Sampler, rows: int) -> Draw:
    """Return a draw for the gates of all units; it has no gates where only single weights have them."""
    sites = list(net.sites.values())
    if not sites:
        nothing = net.like.new_zeros(0)
        return sampler.draw(nothing, nothing, rows)
    pi = probabilities(sites, net.k).detach()
    sizes = torch.cat([torch.full_like(s.phi.detach(), len(s)) for s in sites])
    return sampler.draw(pi, sizes, rows, mixed(net, rows))


def _with_weights(net: GatedModel, sampler: Sampler, units: Draw) -> tuple[Draw, Draw]:
    """Return the draw for the units, and one for single weights, whose gates the whole batch shares.

    An estimator that flips gates flips either units or weights in a step. A coin decides which of the two.
    """
    pi = torch.cat([w.probability(net.k).detach().flatten() for w in net.weights.values()])
    sizes = torch.cat([w.phi.new_full((w.phi.numel(),), w.phi.numel()) for w in net.weights.values()]).detach()
    weights = sampler.draw(pi, sizes, 1)
    if units.chosen is None or weights.chosen is None:
        return units, weights
    coin = bool(torch.rand((), device="cpu") < 0.5)
    return units.flipping(coin), weights.flipping(not coin)


def shared(net: GatedModel) -> Tensor:
    """Return which gates the whole batch must share, as a boolean mask of shape (units,)."""
    per_sample = net.gating.per_sample
    masks = [torch.full((len(s),), not per_sample[name], device=s.phi.device) for name, s in net.sites.items()]
    return torch.cat(masks)


def mixed(net: GatedModel, rows: int) -> Tensor | None:
    """Return the mask `shared` if some gates are shared while others are drawn for each of the rows, else None."""
    return shared(net) if rows > 1 and not all(net.gating.per_sample.values()) else None


def draws_per_sample(net: GatedModel, sampler: Sampler) -> bool:
    """Return whether every sample gets gates of its own."""
    if sampler.mode == "batch" or not any(net.gating.per_sample.values()):
        return False
    if sampler.mode == "sample":
        return True
    return bool(sampler.samples_apart) and not uses_batch_statistics(net.model)
