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
from plasticnet.oneshot.fisher import fisher_of_loss, fisher_of_outputs
from plasticnet.oneshot.minimum import Watched
from plasticnet.oneshot.replaceable import unreplaceable
from plasticnet.oneshot.sums import in_double, sums_by_unit
from plasticnet.tools.batches import Forward
from plasticnet.tools.inputs import Loss, Outputs
from plasticnet.tools.snapshot import left_as_it_was

Scores = str | Mapping[str, Tensor]  # a kind of score, or for each site the scores of its units
KINDS = ("fisher", "repair", "magnitude", "taylor", "gate")
_OF_LOSS = ("fisher", "repair")  # how much the loss grows: these need no labels, and compare across sites as they are
_OF_BATCH = {"fisher": fisher_of_loss, "taylor": taylor_squares, "gate": gate_squares}


class UnitScores(dict[str, Tensor]):
    """For each site the scores of its units, shape (units,), and what kind they are.

    Attributes:
        kind: The kind of score.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


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
        A dict with the scores of the units of each site, shape (units,). Those of closed units are 0. It knows its
        ``kind``, so that `prune_once` does with it what it does with the name of the kind.

    Raises:
        PlasticError: The kind is unknown; the network has no units with gates; the loss is missing, does not depend on
            the network, is not finite or is at its minimum; or the scores are not finite, or all 0.

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
    if not net.sites:
        raise PlasticError("there are no units to score: only single weights have gates")
    if kind == "magnitude":
        squares = sums_by_unit(net, lambda p: in_double(p).square()) * (net.mean_gates()[0][:-1] > 0)
    else:
        with net.lock, left_as_it_was(net, training=False), without_cudnn(net):
            if loss is not None and kind != "repair":
                squares = _of_loss(net, kind, loss, batches)
            elif kind in _OF_LOSS and not isinstance(batches, int):
                squares = fisher_of_outputs(net, batches, calibrate, forward, outputs)
                if kind == "repair":
                    squares = unreplaceable(net, squares, batches, calibrate, forward)
            else:
                more = ", or batches=[...], inputs without labels" if kind in _OF_LOSS else ""
                raise PlasticError(
                    f"scores={kind!r} follow a gradient and need a loss: a function that runs net on data{more}"
                )
        squares = net.ranks.average(squares)
    if not bool(squares.any()):
        raise PlasticError(f"scores={kind!r} are all 0: no unit moves the loss (a last layer of zeros, say)")
    found = UnitScores(kind)
    for (name, site), part in zip(net.sites.items(), squares.split([len(s) for s in net.sites.values()]), strict=True):
        if not bool(torch.isfinite(part).all()):
            raise PlasticError(f"site {name!r}: its scores are not finite; look for NaN in the weights or gradients")
        even = part if kind in _OF_LOSS else (part / part.mean().clamp(min=1e-300)).sqrt()
        found[name] = even.to(site.phi.dtype)
    return found


def _of_loss(net: PlasticNet, kind: str, loss: Loss, batches: int | Iterable[Any]) -> Tensor:
    """Return the squares of a kind of score that follows a gradient, averaged over mini-batches, shape (units,)."""
    if type(batches) is not int or batches < 1:
        raise PlasticError(f"batches={batches!r}: with a loss, how often it is called, 1 or more")
    watched = Watched(net, loss)
    squares = torch.stack([_OF_BATCH[kind](net, watched) for _ in range(batches)]).mean(0)
    watched.check()
    return squares


def by_cost(given: Scores) -> bool:
    """Return whether scores are to be divided by what a unit costs, as those are that say how much the loss grows."""
    return (given if isinstance(given, str) else getattr(given, "kind", None)) in _OF_LOSS


def resolve(net: PlasticNet, given: Scores, loss: Loss | None, **options: Any) -> dict[str, np.ndarray]:
    """Return the scores of all units as arrays of shape (units,), by site.

    Args:
        net: The network.
        given: A kind of score, which is computed by `scores`, or the scores themselves.
        loss: The loss for `scores`.
        options: Its other arguments.

    Raises:
        PlasticError: The given scores do not have shape (units,) or are not finite; or `scores` raises it.
    """
    found = given if isinstance(given, Mapping) else scores(net, given, loss, **options)
    worth: dict[str, np.ndarray] = {}
    for name, site in net.sites.items():
        values = torch.as_tensor(found[name]).detach().cpu().double() if name in found else torch.zeros(0)
        if values.shape != (len(site),) or not bool(torch.isfinite(values).all()):
            raise PlasticError(
                f"site {name!r}: the scores have shape {tuple(values.shape)} or are not finite; needed is a number for "
                f"each unit, shape ({len(site)},), as from pn.scores"
            )
        worth[name] = values.numpy()
    return worth
