"""Growth by the gradient: more units than wanted are added and tried out, and the most promising ones stay.

A new unit with outgoing weights of zero changes nothing, but these weights have a gradient. The larger the gradient is,
the more the loss will fall because of the unit (GradMax, Evci et al., arXiv 2201.05125).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.meanwhile import at_k
from plasticnet.surgery.optimizers import Optimizers
from plasticnet.surgery.resize import check_counts, grow, resize
from plasticnet.surgery.survivors import alive
from plasticnet.tools.inputs import Loss
from plasticnet.tools.shapes import along
from plasticnet.tools.sharding import refuse_sharded
from plasticnet.tools.snapshot import left_as_it_was
from plasticnet.units import BlockUnits, InputUnits

ASCENT = 4  # the number of steps by which the incoming weights of a candidate enlarge the gradient
_SHARE = 0.5  # the length of the first step, as a share of the weights' own norm
_PROBE = 1e-3  # the norm of the outgoing weights with which the direction of a step is found


def grow_by_gradient(
    net: GatedModel,
    counts: Mapping[str, int],
    loss: Loss,
    optimizer: Optimizers = None,
    *,
    ascend: bool = True,
    grace: int = 0,
) -> None:
    """Add the units that promise most, chosen from twice as many candidates.

    New units have outgoing weights of zero, so that the network computes what it did before.

    Args:
        net: The network.
        counts: How many units each site gets.
        loss: A function without arguments that runs the network on some training data and returns its losses, shape
            (batch,), or their mean.
        optimizer: The optimizer, or all of those, that hold the parameters.
        ascend: Whether the incoming weights of the candidates are first changed, at equal norm, so that the gradient of
            the outgoing weights grows.
        grace: For how many epochs of the schedule new units are held open and unpriced.

    Raises:
        PlasticError: The loss does not depend on the network, it or its gradient is not finite, the counts do
            not fit the sites, more features were asked for than are closed, or the optimizers cannot be resized.
    """
    check_counts(net, counts)
    refuse_sharded(net, 'grow(init="gradmax")')
    for name, n in counts.items():
        if isinstance(net.sites[name].units, BlockUnits):
            raise PlasticError(
                f'site {name!r} holds whole blocks, which begin as the identity: init="gradmax" has nothing to choose'
            )
        if n > (left := net.sites[name].spare):
            raise PlasticError(f"site {name!r}: {n} features were to be re-opened, but only {left} are closed")
    before = {name: site.grace.clone() for name, site in net.sites.items()}
    for site in net.sites.values():
        site.grace.clamp_(max=0)  # What sleeps goes on sleeping.
    grow(net, {name: _candidates(net, name, n) for name, n in counts.items()}, optimizer, grace=1)
    new = {name: site.grace == 1 for name, site in net.sites.items()}
    with aside(net):
        for step in range(ASCENT if ascend else 0):
            _ascend(net, new, loss, _SHARE / (1 + step))
        benefit = _benefits(net, loss)
    _settle(net, _chosen(net, counts, new, benefit), new, before, grace, optimizer)


def _settle(
    net: GatedModel,
    keep: Mapping[str, np.ndarray],
    new: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    grace: int,
    optimizer: Optimizers,
) -> None:
    """Cut the candidates that do not stay, and restore the grace of the old units.

    Args:
        net: The network.
        keep: Masks of the units that stay, shape (units,), by site.
        new: Masks of the units that are candidates, shape (units,), by site.
        before: The grace of the old units, by site.
        grace: The grace of the new units.
        optimizer: The optimizer, or all of those, that hold the parameters.
    """
    for name, site in net.sites.items():
        site.grace.fill_(grace)
        site.grace[~new[name]] = before[name]
    resize(net, {n: np.flatnonzero(mask).tolist() for n, mask in keep.items() if not mask.all()}, optimizer)


def _candidates(net: GatedModel, name: str, n: int) -> int:
    """Return how many candidates a site gets when ``n`` units are wanted."""
    return int(min(2 * n, net.sites[name].spare))


@contextmanager
def aside(net: GatedModel) -> Iterator[None]:
    """Run the network open and in training mode in this context, and leave nothing behind here or on other ranks."""
    outer, net.ranks.aside = net.ranks.aside, True
    try:
        with left_as_it_was(net, training=True), at_k(net, math.inf):
            yield
    finally:
        net.ranks.aside = outer


def _gradients(net: GatedModel, loss: Loss, names: list[str]) -> dict[str, Tensor]:
    """Return the gradients of some parameters by name, averaged over all ranks.

    Parameters that do not train have gradients of 0.

    Raises:
        PlasticError: The loss does not depend on the network or is not finite.
    """
    parameters = dict(net.model.named_parameters())
    with torch.enable_grad():
        value = loss()
        value = value.mean() if isinstance(value, Tensor) else value
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise PlasticError("growth by the gradient needs a loss that depends on the network: compute it from net(x)")
    if not bool(torch.isfinite(value.detach()).all()):
        raise PlasticError("the loss that growth is to follow is not finite (NaN or infinite); nothing was grown")
    trained = [n for n in names if parameters[n].requires_grad]
    found = torch.autograd.grad(value, [parameters[n] for n in trained], allow_unused=True) if trained else ()
    gradients = {n: torch.zeros_like(parameters[n]) for n in names}
    gradients.update((n, g.contiguous()) for n, g in zip(trained, found, strict=True) if g is not None)
    for g in gradients.values():
        net.ranks.average(g)
    if not all(bool(torch.isfinite(g).all()) for g in gradients.values()):
        raise PlasticError(
            "the loss that growth is to follow has a gradient that is NaN or infinite; nothing was grown"
        )
    return gradients


def outgoing_gradients(net: GatedModel, loss: Loss) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients of the weights that read units, and how large each unit's part of them is.

    Returns:
        The gradients by the names of the parameters; and the squared norms of the units' parts, shape (units + 1,) for
        the units of all sites and the constant 1.
    """
    readers = net.gating.readers
    gradients = _gradients(net, loss, list(dict.fromkeys(r.tensor for r in readers)))
    total = readers[0].units.new_zeros(sum(len(s) for s in net.sites.values()) + 1, dtype=torch.float64)
    for r in readers:
        squares = gradients[r.tensor].double().square().transpose(0, r.dim)
        squares = squares.reshape(len(squares), -1).sum(1)  # what is read where it is born may be a vector
        for units in (r.units, r.features):
            if units is not None:
                total.index_add_(0, units, squares)
    return gradients, total


def _benefits(net: GatedModel, loss: Loss) -> dict[str, np.ndarray]:
    """Return the squared norms of the gradients of each unit's outgoing weights, shape (units,) by site."""
    _, total = outgoing_gradients(net, loss)
    parts = total[:-1].split([len(s) for s in net.sites.values()])
    return {name: part.cpu().numpy() for name, part in zip(net.sites, parts, strict=True)}


@torch.no_grad()
def _ascend(net: GatedModel, new: Mapping[str, Tensor], loss: Loss, share: float) -> None:
    """Move the incoming weights of the candidates by one step that enlarges the gradient g of the outgoing ones.

    With outgoing weights of -e g / |g|, the loss is lower by e |g|. So the ordinary gradient of the incoming weights
    shows how |g| grows, and no second derivative is needed.

    Args:
        net: The network.
        new: Masks of the units that are candidates, shape (units,), by site.
        loss: The loss.
        share: The length of the step, as a share of the norm of a candidate's own weights.
    """
    parameters = dict(net.model.named_parameters())
    incoming = _incoming(net, new, parameters)
    if not incoming:  # Features of an input have no incoming weights.
        return
    gradients, total = outgoing_gradients(net, loss)
    norms = total.sqrt().clamp(min=1e-30)
    added = torch.cat([*new.values(), new[next(iter(new))].new_zeros(1)])
    kept: dict[str, Tensor] = {}
    try:
        for r in net.gating.readers:
            weight = parameters[r.tensor]
            kept.setdefault(r.tensor, weight.detach().clone())
            scale = torch.where(added[r.units], _PROBE / norms[r.units], 0.0).to(weight.dtype)
            weight -= along(scale, r.dim, weight.dim()) * gradients[r.tensor]
        uphill = _gradients(net, loss, list(dict.fromkeys(n for n, *_ in incoming)))
    finally:
        with torch.no_grad():  # again, because an interrupt may leave gradients on
            for name, before in kept.items():
                parameters[name].copy_(before)
    for name, dim, index in incoming:
        rows = parameters[name].detach().transpose(0, dim)
        own = rows[index]
        towards = -uphill[name].transpose(0, dim)[index]
        moved = own + share * _length(own) * towards / _length(towards)
        rows[index] = moved * _length(own) / _length(moved)


def _length(rows: Tensor) -> Tensor:
    """Return the norm of every row in a shape that broadcasts over the rows, and never 0."""
    length = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.dim())), keepdim=True)
    return length.clamp(min=1e-30)


def _incoming(
    net: GatedModel, new: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> list[tuple[str, int, Tensor]]:
    """Return where the incoming weights of the candidates lie, as triples of parameter, dimension and positions."""
    found = []
    for name, site in net.sites.items():
        for s in site.units.slices:
            if not s.consumed and s.tensor in parameters and parameters[s.tensor].dim() > 1:
                index = torch.from_numpy(s.index).to(new[name].device)[new[name]].reshape(-1)
                if len(index) and parameters[s.tensor].requires_grad:
                    found.append((s.tensor, s.dim, index))
    return found


def _chosen(
    net: GatedModel, counts: Mapping[str, int], new: Mapping[str, Tensor], benefit: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return masks of the units that stay, by site: all old units, and the best of the candidates."""
    had = {name: ~mask.cpu().numpy() for name, mask in new.items()}
    units = {name: site.units for name, site in net.sites.items()}
    keep = {  # The features of an added channel come and go with it.
        name: had[name] | ~alive(u, units, had) if isinstance(u, InputUnits) else had[name].copy()
        for name, u in units.items()
    }
    for name, n in counts.items():
        left = np.flatnonzero(~keep[name])
        keep[name][left[np.argsort(-benefit[name][left], kind="stable")[:n]]] = True
    return keep
