"""Resize: the one operation for growth and pruning.

A resize takes a list of source indices for each site: ``[0, 2, 3, -1, -1]`` keeps three units and adds two. A `Plan`
says, for every dimension of every tensor, which old positions make up the new ones, with -1 for a new position.
`apply_plan` rewrites parameters, buffers, attributes of modules and the state of the optimizers by the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import INITIAL_LOGIT, OPEN_LOGIT
from plasticnet.surgery.depth import check_wake, wake
from plasticnet.surgery.optimizers import Optimizers, listed
from plasticnet.surgery.plan import Plan, Sources, lengths, plan_resize
from plasticnet.surgery.rewrite import apply_plan, rewrite
from plasticnet.surgery.survivors import to_keep
from plasticnet.units import BlockUnits, InputUnits


def resize(
    net: GatedModel, sources: Sources, optimizer: Optimizers = None, init: str = "preserve", grace: int = 0
) -> None:
    """Rebuild sites from lists of source indices.

    Args:
        net: The network.
        sources: For each site the old units that stay, in order, and -1 for a new one, as in `PlasticNet.resize`.
        optimizer: The optimizer, or all of those, that hold the parameters.
        init: How new units begin, one of `INITS`.
        grace: For how many epochs of the schedule new units are held open and unpriced.

    Raises:
        PlasticError: The sources do not fit, ``init`` is unknown, or the optimizers cannot be resized. Nothing was
            changed.
    """
    if not isinstance(sources, Mapping):
        raise PlasticError(f"resize takes a mapping of site to source indices, not a {type(sources).__name__}")
    optimizers = listed(optimizer)
    opened = OPEN_LOGIT / net.k if 0 < net.k < math.inf else INITIAL_LOGIT
    logits = {s.name: (s.phi, 0.0 if init == "paper" else opened) for s in net.sites.values()}
    weights = {w.name: (w.phi, opened) for w in net.weights.values()}
    with net.ranks.alike(net.like.device):
        planned = plan_resize({s.name: s.units for s in net.sites.values()}, lengths(net.model), sources)
        moved = apply_plan(net.model, planned, logits, optimizers, init, weights)
    for g in net.all_gates():
        g.phi = moved.get(g.phi, g.phi)
    for site in net.sites.values():
        if site.name in planned.sources:
            source = planned.sources[site.name]
            site.grace = rewrite(site.grace, {0: source})
            site.grace[torch.from_numpy(source < 0).to(site.grace.device)] = grace
    adopt(net, planned)
    if moved:
        net.ranks.outgrow()


def adopt(net: GatedModel, planned: Plan) -> None:
    """Give the sites the units that a plan has left, and work out anew everything that depends on their sizes."""
    for site in net.sites.values():
        site.units = planned.units[site.name]
        if isinstance(site.units, InputUnits):
            site.features = torch.from_numpy(site.units.features).to(site.phi.device)
    net.resized |= bool(planned.sources)
    net.refresh()


def grow(
    net: GatedModel, counts: Mapping[str, int], optimizer: Optimizers = None, init: str = "preserve", grace: int = 0
) -> None:
    """Add units: ``{"conv1": 2}`` adds two to a site. In a site of blocks, the next ones that sleep wake.

    Args:
        net: The network.
        counts: How many units each site gets.
        optimizer: The optimizer, or all of those, that hold the parameters.
        init: How new units begin, one of `INITS`.
        grace: For how many epochs of the schedule new units are held open and unpriced.

    Raises:
        PlasticError: A site is unknown, a number is negative or not whole, fewer blocks sleep, or `resize` raises it.
            Nothing was changed.
    """
    check_counts(net, counts)
    deeper = {n: count for n, count in counts.items() if isinstance(net.sites[n].units, BlockUnits)}
    check_wake(net, deeper)
    sources = {n: [*range(len(net.sites[n])), *[-1] * count] for n, count in counts.items() if n not in deeper}
    resize(net, sources, optimizer, init, grace)
    if any(deeper.values()):  # after the others, since a block gets the widths that it finds beside it
        wake(net, deeper, listed(optimizer), lambda sources: resize(net, sources, optimizer, "random", grace), grace)


def check_counts(net: GatedModel, counts: Mapping[str, int]) -> None:
    """Raise `PlasticError` unless these are whole numbers of units, 0 or more, for sites of the network."""
    if any(type(n) is not int or n < 0 for n in counts.values()):
        raise PlasticError(f"{dict(counts)}: the units to add are whole numbers, 0 or more; to remove, use prune")
    unknown = [n for n in counts if n not in net.sites]
    if unknown:
        raise PlasticError(f"there is no site {unknown[0]!r}; the sites are: {', '.join(net.sites)}")


def prune(net: GatedModel, below: float = 0.5, optimizer: Optimizers = None, multiple_of: int = 1) -> dict[str, int]:
    """Cut the units whose gate has a probability below a threshold, as `PlasticNet.prune` does.

    Args:
        net: The network.
        below: The threshold, from 0 to 1.
        optimizer: The optimizer, or all of those, that hold the parameters.
        multiple_of: What widths are to be a multiple of, now and when the network is compacted.

    Returns:
        How many units were cut, for each site that lost some.

    Raises:
        PlasticError: An option is out of range, gates are not finite, or the optimizers cannot be resized. Nothing was
            changed.
    """
    sources = to_keep(net, below, multiple_of)
    before = {n: len(s) for n, s in net.sites.items()}
    if sources:
        resize(net, sources, optimizer)
    net.multiple_of = multiple_of
    return {n: before[n] - len(s) for n, s in net.sites.items() if before[n] != len(s)}
