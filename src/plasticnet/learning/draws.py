"""Which gates a call of the network gets: one draw for each step, per sample or per batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import probabilities
from plasticnet.learning.estimators import Draw
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.inputs import batch_size
from plasticnet.tools.snapshot import RandomState
from plasticnet.tools.statistics import uses_batch_statistics


def gates_of_call(net: GatedModel, sampler: Sampler, now: Pass, args: Any, kwargs: Any) -> Tensor:
    """The gates of this call, shape (rows, units + 1); those of single weights are noted in the pass.

    Raises `PlasticError` when a step calls the network on batches of different sizes and gates are drawn per sample.
    """
    if now.role == "probe":
        assert now.probe is not None
        return now.probe(batch_size(args, kwargs))
    step, weights = now.step, list(net.weights.values())  # a list: torch.compile takes any mapping proxy for a full one
    rows = batch_size(args, kwargs) if draws_per_sample(net, sampler) else 1
    if step.draw is None:
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


def gates_of_pass(sampler: Sampler, i: int) -> Callable[[Draw], Tensor]:
    """The gates that the estimator's pass ``i`` has under a draw."""
    gates = sampler.rule.gates
    return lambda draw: gates(draw, i)


def _draw_units(net: GatedModel, sampler: Sampler, rows: int) -> Draw:
    sites = list(net.sites.values())
    if not sites:
        nothing = net.like.new_zeros(0)
        return sampler.draw(nothing, nothing, rows)
    pi = probabilities(sites, net.k).detach()
    sizes = torch.cat([torch.full_like(s.phi.detach(), len(s)) for s in sites])
    return sampler.draw(pi, sizes, rows, mixed(net, rows))


def _with_weights(net: GatedModel, sampler: Sampler, units: Draw) -> tuple[Draw, Draw]:
    """The draw for the units, and one for single weights, which the batch shares. Of the units or the weights one kind
    is flipped in a step: a coin says which."""
    pi = torch.cat([w.probability(net.k).detach().flatten() for w in net.weights.values()])
    sizes = torch.cat([w.phi.new_full((w.phi.numel(),), w.phi.numel()) for w in net.weights.values()]).detach()
    weights = sampler.draw(pi, sizes, 1)
    if units.chosen is None or weights.chosen is None:
        return units, weights
    coin = bool(torch.rand((), device="cpu") < 0.5)
    return units.flipping(coin), weights.flipping(not coin)


def shared(net: GatedModel) -> Tensor:
    """Which gates the whole batch shares in any case, a boolean mask of shape (units,)."""
    per_sample = net.gating.per_sample
    masks = [torch.full((len(s),), not per_sample[name], device=s.phi.device) for name, s in net.sites.items()]
    return torch.cat(masks)


def mixed(net: GatedModel, rows: int) -> Tensor | None:
    """`shared`, where others draw once for each of some rows; else None."""
    return shared(net) if rows > 1 and not all(net.gating.per_sample.values()) else None


def draws_per_sample(net: GatedModel, sampler: Sampler) -> bool:
    """Whether every sample gets gates of its own."""
    if sampler.mode == "batch" or not any(net.gating.per_sample.values()):
        return False
    if sampler.mode == "sample":
        return True
    return bool(sampler.samples_apart) and not uses_batch_statistics(net.model)
