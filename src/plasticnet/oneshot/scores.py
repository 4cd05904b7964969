"""Scores what each unit of a network is worth: by the size of its weights, or by what the loss says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.oneshot.derivatives import gate_squares, taylor_squares, without_cudnn
from plasticnet.oneshot.entries import entries_by_loss, entries_by_outputs, entries_by_size
from plasticnet.oneshot.fisher import fisher_of_loss, fisher_of_outputs
from plasticnet.oneshot.minimum import Watched
from plasticnet.oneshot.replaceable import unreplaceable
from plasticnet.oneshot.sums import in_double, sums_by_unit
from plasticnet.tools.batches import Forward
from plasticnet.tools.gradients import outside_inference_mode
from plasticnet.tools.half import products_in_single
from plasticnet.tools.inputs import Loss, Outputs
from plasticnet.tools.sharding import refuse_sharded
from plasticnet.tools.snapshot import left_as_it_was

Scores = str | Mapping[str, Tensor]  # a kind of score, or for each site the scores of its units
KINDS = ("fisher", "repair", "magnitude", "taylor", "gate")
_OF_LOSS = ("fisher", "repair")  # how much the loss grows: these need no labels, and compare across sites as they are
_OF_BATCH = {"fisher": fisher_of_loss, "taylor": taylor_squares, "gate": gate_squares}


class UnitScores(dict[str, Tensor]):
    """For each site the scores of its units, shape (units,), and what kind they are.

    Of each weight whose entries have gates, it holds the scores of these entries, in its shape, by its name.

    Attributes:
        kind: The kind of score.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


@outside_inference_mode()
def scores(
    net: PlasticNet,
    kind: str = "fisher",
    loss: Loss | None = None,
    *,
    batches: int | Iterable[Any] = 1,
    forward: Forward | None = None,
    outputs: Outputs | None = None,
    calibrate: int = 2048,
) -> UnitScores:
    """Return what each unit of a network is worth.

    The kinds of score are:

    - "fisher": by how much the loss grows without the unit, to second order: half the mean of the squared derivatives
      of the samples' losses with respect to the gate (Theis et al., arXiv 1801.05787). It needs no labels: without
      ``loss``, targets are drawn from the model's own outputs for ``batches``.
    - "repair": the same after `repair`, for ``batches`` without labels: the part of it that those units of the site
      which stay longer cannot replace when what reads them is refitted.
    - "magnitude": the L2 norm of the parameters that produce a unit. These are rows of weights, the bias, and the scale
      and shift of its norms. For a feature of an input site it is the norm of its column, and for a block that of all
      its parameters.
    - "taylor": an estimate of how much the loss changes without the unit, the sum of gradient times weight over the
      same parameters (Molchanov et al., arXiv 1906.10771); of a layer and the BatchNorm behind it, over those of the
      latter.
    - "gate": another such estimate, the derivative of the loss with respect to the gate (Theis et al., arXiv
      1801.05787). The gate acts where units are read, and the statistics of norms stay as they are.

    The squares of the latter two are averaged over the mini-batches. Those of "gate" are averaged over samples too,
    where ``loss`` returns losses of samples and all gates can be drawn per sample.

    Those of "fisher" and "repair" compare across sites as they are. Other scores of a site are divided by their root
    mean square. Without this, their scale would differ from layer to layer, and all but one unit of a layer might
    close.

    Where single weights have gates, each of their entries is scored by the same rule: it is a unit whose only parameter
    is the entry. "taylor" and "gate" say the same of it, and "repair" is "fisher", because `repair` leaves such weights
    as they are.

    Args:
        net: The network. It is run in evaluation mode and left exactly as it was, gradients and random numbers
            included.
        kind: "fisher", "repair", "magnitude", "taylor" or "gate".
        loss: A function without arguments that runs the network on some data and returns its losses, shape (batch,), or
            their mean. "magnitude" does not need it, and neither does "fisher" with inputs.
        batches: How often the loss is called, each time with another mini-batch. For "fisher" without a loss: the
            inputs, as for `repair`.
        forward: What runs the network on a batch of inputs, as for `repair`.
        outputs: What counts in the output, as for `repair`.
        calibrate: The number of inputs at which reading stops.

    Returns:
        A dict with the scores of the units of each site, shape (units,), and of the entries of each weight that has
        gates, in its shape. Those of what is closed are 0. It knows its ``kind``, so that `prune_once` does with it
        what it does with the name of the kind.

    Raises:
        PlasticError: The kind is unknown; the loss is missing, does not depend on the network, is not finite or is at
            its minimum; a batch is empty, or the outputs on it are not finite; or the scores are not finite, or all 0.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0], [3.0], [2.0]]).expand(3, 4))
        ...     _ = model[0].bias.zero_()
        >>> net = pn.PlasticNet(model, (torch.randn(2, 4),))
        >>> pn.scores(net, "magnitude")["0"].argsort().tolist()
        [0, 2, 1]
    """
    if kind not in KINDS:
        raise PlasticError(f"scores={kind!r}: choose one of {', '.join(KINDS)}")
    refuse_sharded(net, f"scores={kind!r}")
    if kind == "magnitude":
        squares = _of_sizes(net)
    else:
        with net.lock, left_as_it_was(net, training=False), without_cudnn(net):
            found = _of_data(net, kind, loss, batches, calibrate, forward, outputs)
        squares = [net.ranks.average(t.contiguous()) for t in found]
    if not any(bool(part.any()) for part in squares):
        raise PlasticError(f"scores={kind!r} are all 0: no unit moves the loss (a last layer of zeros, say)")
    result = UnitScores(kind)
    for gated, part in zip(net.all_gates(), squares, strict=True):
        if not bool(torch.isfinite(part).all()):
            raise PlasticError(
                f"site {gated.name!r}: its scores are not finite; look for NaN in the weights or gradients"
            )
        even = part if kind in _OF_LOSS else (part / part.mean().clamp(min=1e-300)).sqrt()
        result[gated.name] = even.to(gated.phi.dtype)
    return result


def _of_data(
    net: PlasticNet,
    kind: str,
    loss: Loss | None,
    batches: int | Iterable[Any],
    calibrate: int,
    forward: Forward | None,
    outputs: Outputs | None,
) -> list[Tensor]:
    """Return the squares of a kind of score that runs the network: of each site, and of each weight."""
    units, entries = torch.zeros(0, dtype=torch.float64, device=net.like.device), list[Tensor]()
    if loss is not None and kind != "repair":
        with products_in_single(net.model):
            units, entries = _of_loss(net, kind, loss, batches)
    elif kind in _OF_LOSS and not isinstance(batches, int):
        with products_in_single(net.model):
            if net.sites:
                units = fisher_of_outputs(net, batches, calibrate, forward, outputs)
            if net.weights:
                entries = entries_by_outputs(net, batches, calibrate, forward, outputs)
        if net.sites and kind == "repair":
            units = unreplaceable(net, units, batches, calibrate, forward)
    else:
        more = ", or batches=[...], inputs without labels" if kind in _OF_LOSS else ""
        raise PlasticError(f"scores={kind!r} follow a gradient and need a loss: a function that runs net on data{more}")
    return [*_by_site(net, units), *entries]


def _of_sizes(net: PlasticNet) -> list[Tensor]:
    """Return the squared norms of what produces units, of each site, and the squares of entries, of each weight."""
    if not net.sites:
        return entries_by_size(net)
    units = sums_by_unit(net, lambda p: in_double(p).square()) * (net.mean_gates()[0][:-1] > 0)
    return [*_by_site(net, units), *entries_by_size(net)]


def _by_site(net: PlasticNet, units: Tensor) -> list[Tensor]:
    """Return the parts of a vector of all units that belong to each site."""
    return list(units.split([len(s) for s in net.sites.values()])) if net.sites else []


def _of_loss(net: PlasticNet, kind: str, loss: Loss, batches: int | Iterable[Any]) -> tuple[Tensor, list[Tensor]]:
    """Return the squares of a score that follows a gradient, averaged over mini-batches: of units, and of weights."""
    if type(batches) is not int or batches < 1:
        raise PlasticError(f"batches={batches!r}: with a loss, how often it is called, 1 or more")
    watched = Watched(net, loss)
    units = torch.zeros(0, dtype=torch.float64, device=net.like.device)
    entries = [torch.zeros((), dtype=torch.float64)] * len(net.weights)
    for _ in range(batches):
        if net.sites:
            more = _OF_BATCH[kind](net, watched)
            units = more / batches + (units if len(units) else 0)
        if net.weights:
            more = entries_by_loss(net, watched, kind)
            entries = [t + g / batches for t, g in zip(entries, more, strict=True)]
    watched.check()
    return units, entries


def by_cost(given: Scores) -> bool:
    """Return whether scores are to be divided by what a unit costs, as those are that say how much the loss grows."""
    return (given if isinstance(given, str) else getattr(given, "kind", None)) in _OF_LOSS


def resolve(net: PlasticNet, given: Scores, loss: Loss | None, **options: Any) -> dict[str, np.ndarray]:
    """Return the scores of all units as arrays of shape (units,), by site, and of single weights in their shapes.

    Args:
        net: The network.
        given: A kind of score, which is computed by `scores`, or the scores themselves; those of single weights may be
            left out, but of all of them.
        loss: The loss for `scores`.
        options: Its other arguments.

    Raises:
        PlasticError: The given scores do not have shape (units,) or are not finite; or `scores` raises it.
    """
    found = given if isinstance(given, Mapping) else scores(net, given, loss, **options)
    worth: dict[str, np.ndarray] = {}
    entries = [w for w in net.weights.values() if any(name in found for name in net.weights)]
    for gated in (*net.sites.values(), *entries):
        name, shape = gated.name, tuple(gated.phi.shape)
        values = torch.as_tensor(found[name]).detach().cpu().double() if name in found else torch.zeros(0)
        if tuple(values.shape) != shape or not bool(torch.isfinite(values).all()):
            raise PlasticError(
                f"site {name!r}: the scores have shape {tuple(values.shape)} or are not finite; needed is a number for "
                f"each unit, shape {shape}, as from pn.scores"
            )
        worth[name] = values.numpy()
    return worth
