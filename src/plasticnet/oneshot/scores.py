"""What each unit of a network is worth: by the size of its weights, or by what the loss says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.oneshot.derivatives import gate_squares, taylor_squares, without_cudnn
from plasticnet.oneshot.sums import in_double, sums_by_unit
from plasticnet.tools.inputs import Loss
from plasticnet.tools.snapshot import left_as_it_was

Scores = str | Mapping[str, Tensor]  # a kind, or a number per unit
KINDS = ("magnitude", "taylor", "gate")


def scores(net: PlasticNet, kind: str, loss: Loss | None = None, *, batches: int = 1) -> dict[str, Tensor]:
    """What each unit is worth: for every site the scores of its units, shape (units,), 0 for closed ones.

    "magnitude" is the L2 norm of the parameters that produce a unit (rows of weights, bias, scale and shift of its
    norms); of a feature of an input site, that of its column; of a block, that of all its parameters. The other
    two estimate how much the loss changes when the unit goes: "taylor" is the sum of gradient times weight over
    the same parameters (Molchanov et al., arXiv 1906.10771), "gate" the derivative with respect to the gate, which
    acts at what consumers read (the statistics of norms stay as they are). Of both the squares are averaged over
    mini-batches, and those of "gate" over samples (Theis et al., arXiv 1801.05787) where ``loss`` gives losses per
    sample and all gates can be drawn per sample.

    All are divided by their root mean square over the site, so that they compare across sites. As they come their
    scale differs from layer to layer, and all of a layer but one unit may close.

    ``loss`` is a function without arguments that runs ``net`` on some data and returns its losses, shape (batch,), or a
    scalar. It is called ``batches`` times, in evaluation mode. Nothing of it is left behind, gradients and random
    numbers included.

    Raises `PlasticError` for an unknown kind, where a loss is missing, does not depend on the network or is not
    finite, and where scores are not finite or all 0.
    """
    if kind not in KINDS:
        raise PlasticError(f"scores={kind!r}: choose one of {', '.join(KINDS)}")
    if not net.sites:
        raise PlasticError("there are no units to score: only single weights have gates")
    if type(batches) is not int or batches < 1:
        raise PlasticError(f"batches={batches!r}: how often the loss is called, 1 or more")
    if kind == "magnitude":
        squares = sums_by_unit(net, lambda p: in_double(p).square()) * (net.mean_gates()[0][:-1] > 0)
    elif loss is None:
        raise PlasticError(f"scores={kind!r} follow a gradient and need a loss: a function that runs net on data")
    else:
        of_batch = taylor_squares if kind == "taylor" else gate_squares
        with left_as_it_was(net, training=False), without_cudnn(net):
            squares = torch.stack([of_batch(net, loss) for _ in range(batches)]).mean(0)
        squares = net.ranks.average(squares)
    if not bool(squares.any()):
        raise PlasticError(f"scores={kind!r} are all 0: no unit moves the loss (a last layer of zeros, say)")
    found: dict[str, Tensor] = {}
    for (name, site), part in zip(net.sites.items(), squares.split([len(s) for s in net.sites.values()]), strict=True):
        if not bool(torch.isfinite(part).all()):
            raise PlasticError(f"site {name!r}: its scores are not finite; look for NaN in the weights or gradients")
        found[name] = (part / part.mean().clamp(min=1e-300)).sqrt().to(site.phi.dtype)
    return found


def resolve(net: PlasticNet, given: Scores, loss: Loss | None) -> dict[str, np.ndarray]:
    """The scores of this kind, or those that were given, as arrays of shape (units,)."""
    found = given if isinstance(given, Mapping) else scores(net, given, loss)
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
