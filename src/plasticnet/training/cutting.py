"""Cuts units at the end of an epoch, and hardens a network when its plastic stages are over.

In a plastic stage the units that hibernate are cut, and sites that have too few open units get their best ones back. A
budget of loss can forbid the cut, and a budget with targets keeps the units that the targets have room for. When the
network hardens, the targets decide which units stay, or the signs of the logits where there are no targets. All other
units are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from plasticnet.budgets.projection import decide, missing, project
from plasticnet.errors import PlasticError
from plasticnet.gates.site import INITIAL_LOGIT, OPEN_LOGIT, set_logits
from plasticnet.net import PlasticNet
from plasticnet.repairing.repair import repair
from plasticnet.surgery.optimizers import forget
from plasticnet.surgery.survivors import survivors, to_keep
from plasticnet.training.force import Force

# A cut takes a small part of a training step, but after it a compiled or wrapped network must be prepared anew.
# So a cut must save this share of the MACs or of the parameters.
PAYS = 0.02


def cut_epoch(
    net: PlasticNet, optimizers: Sequence[Optimizer], force: Force, *, hibernate: float, multiple_of: int
) -> dict[str, int]:
    """End a plastic epoch: count down the grace of new units, reopen what sites need, and cut what hibernates.

    Args:
        net: The network.
        optimizers: The optimizers that hold its parameters.
        force: What presses on the gates, such as the controller of a budget.
        hibernate: The probability below which a unit is cut.
        multiple_of: What widths are to be a multiple of, as in `PlasticNet.prune`.

    Returns:
        How many units were cut, for each site that lost some.
    """
    for site in net.sites.values():
        site.grace.sub_((site.grace > 0).to(site.grace.dtype))
    recover(net, optimizers)
    if not kept_to_loss(net, optimizers, force):
        return {}
    return cut_hibernating(net, optimizers, force, hibernate=hibernate, multiple_of=multiple_of)


def recover(net: PlasticNet, optimizers: Sequence[Optimizer]) -> None:
    """Open the best gates of every site that has fewer open ones than its minimum.

    The optimizers forget the direction in which these gates were moving, because it would close them again. They keep
    the size of the gradients, because without it the next step could have any length.
    """
    for site in net.sites.values():
        if int(site.open.sum()) < min(site.minimum, site.awake):
            units = torch.from_numpy(site.likely(site.minimum)).to(site.phi.device)
            set_logits(site, units, OPEN_LOGIT / net.k)
            forget(optimizers, site.phi, units)


def kept_to_loss(net: PlasticNet, optimizers: Sequence[Optimizer], force: Force) -> bool:
    """Return whether the loss is within its budget; if it is not, put the gates back to where they last kept to it.

    After the gates were put back nothing may be cut. Without a budget of loss the answer is always true.
    """
    if force.within:
        force.remember(net)
        return True
    for g in net.all_gates():
        logits = force.good.get(g.name)
        if logits is not None and g.phi.shape == logits.shape:  # Otherwise the user has resized the site.
            with torch.no_grad():
                g.phi.copy_(logits)
            forget(optimizers, g.phi, torch.ones_like(g.phi, dtype=torch.bool))
    return False


def cut_hibernating(
    net: PlasticNet,
    optimizers: Sequence[Optimizer],
    force: Force,
    *,
    hibernate: float,
    multiple_of: int,
) -> dict[str, int]:
    """Cut the units whose probability is below a threshold, if that makes the network smaller by a share of `PAYS`.

    Where the force has targets, the best units that make up the targets stay whatever their probability is.

    The arguments and the result are those of `cut_epoch`.
    """
    force.notice(net)
    keep = to_keep(net, hibernate, multiple_of)
    if keep and force.targets:
        keep = _with_enough(net, keep, force.targets, multiple_of)
    if not pays(net, keep):
        return {}
    sizes = {name: len(site) for name, site in net.sites.items()}
    net.resize(keep, optimizers)
    force.remember(net)
    return _changes(net, sizes)[0]


def _with_enough(
    net: PlasticNet, keep: dict[str, list[int]], targets: Mapping[str, float], multiple_of: int
) -> dict[str, list[int]]:
    """Return the units to keep: those in ``keep``, and the best others that the targets have room for.

    Args:
        net: The network.
        keep: The indices of the units that do not hibernate, for every site that would lose some.
        targets: The most that the network may cost, for each cost.
        multiple_of: What widths are to be a multiple of.
    """
    sites = net.sites
    try:
        values = project(net, {n: s.phi for n, s in sites.items()}, targets, net.open_weights())
    except PlasticError:  # The units that are held open already cost more than the targets.
        return keep
    for name, site in sites.items():
        stays = values[name].copy()
        stays[keep.get(name, slice(None))] = True
        values[name] = np.where(stays, 1.0, 0.4 * site.probability(net.k).detach().cpu().numpy())
    return survivors({n: s.units for n, s in sites.items()}, values, 0.5, multiple_of)


def pays(net: PlasticNet, keep: Mapping[str, list[int]]) -> bool:
    """Return whether keeping only these units makes the MACs or the parameters smaller by a share of `PAYS`."""
    if not keep:
        return False
    sites = net.sites.items()
    kept = [np.isin(np.arange(len(site)), keep.get(name, range(len(site)))) for name, site in sites]
    then = torch.from_numpy(np.concatenate(kept)).to(next(iter(net.parameters())).device, torch.float32)
    cost, now = net.cost.expected, net.cost.awake.to(then)
    return any(float(cost(then * now, c)) <= (1 - PAYS) * float(cost(now, c)) for c in ("macs", "parameters"))


def harden(
    net: PlasticNet,
    optimizers: Sequence[Optimizer],
    force: Force,
    multiple_of: int,
    batches: Iterable[Any] | None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Cut all closed units of a network at k = infinity.

    Where the force has targets, these first decide which units are open. A site that has fewer open units than its
    minimum keeps the best ones, which are opened.

    Args:
        net: The network.
        optimizers: The optimizers that hold its parameters.
        force: What presses on the gates, such as the controller of a budget.
        multiple_of: What widths are to be a multiple of, as in `PlasticNet.prune`.
        batches: Inputs on which the network is repaired where the targets have closed units, or None.

    Returns:
        How many units were cut, and how many were added, each for the sites where there were any.
    """
    sizes = {name: len(site) for name, site in net.sites.items()}
    for site in net.sites.values():
        site.grace.clamp_(max=0)
    if force.targets:
        were = {name: site.open for name, site in net.sites.items()}
        _open_the_wanted(net, optimizers, force)
        if batches is not None:
            _mend(net, were, batches)
    net.prune(0.5, optimizers, multiple_of)
    for site in net.sites.values():  # A site has a minimum so that these units are used, not only kept.
        if int(site.open.sum()) < min(site.minimum, site.awake):
            set_logits(site, torch.from_numpy(site.likely(site.minimum)).to(site.phi.device), INITIAL_LOGIT)
    return _changes(net, sizes)


def _open_the_wanted(net: PlasticNet, optimizers: Sequence[Optimizer], force: Force) -> None:
    """Open the gates that the targets ask for, and close all others.

    Where earlier cuts have removed more units than the targets ask for, new units are added first.
    """
    units, weights = decide(net, force.targets)
    if counts := missing(net, units, force.targets, force.widths):
        _add_last(net, optimizers, counts)
        units, weights = decide(net, force.targets)
    wanted = {**units, **weights}
    for g in net.all_gates():
        stays = torch.from_numpy(wanted[g.name]).to(g.phi.device)
        set_logits(g, stays & ~g.open, INITIAL_LOGIT)
        set_logits(g, ~stays & g.open, -INITIAL_LOGIT)


def _mend(net: PlasticNet, were: Mapping[str, Tensor], batches: Iterable[Any]) -> None:
    """Refit what reads the units that the targets have closed, so that the network computes what it did before.

    Args:
        net: The network.
        were: Which units were open before, for each site. Units that were added since come last.
        batches: The inputs.
    """
    towards = {n: F.pad(were[n], (0, len(site) - len(were[n]))) for n, site in net.sites.items()}
    if any((was & ~net.sites[n].open).any() for n, was in towards.items()):
        repair(net, batches, towards=towards)


def _add_last(net: PlasticNet, optimizers: Sequence[Optimizer], counts: Mapping[str, int]) -> None:
    """Add new units, with logits that rank them after all others."""
    lowest = float(net.phi().detach().min()) - 1
    sizes = {name: len(net.sites[name]) for name in counts}
    net.grow(counts, optimizers)
    for name, size in sizes.items():
        set_logits(net.sites[name], slice(size, None), lowest)


def _changes(net: PlasticNet, sizes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many units each site has lost, and how many it has gained, since it had the given sizes."""
    more = {name: len(site) - sizes[name] for name, site in net.sites.items()}
    return {name: -n for name, n in more.items() if n < 0}, {name: n for name, n in more.items() if n > 0}


def forget_gates(net: PlasticNet, optimizers: Sequence[Optimizer]) -> None:
    """Let the optimizers drop their whole state of the gates, because it belongs to another k."""
    logits = {g.phi for g in net.all_gates()}
    for optimizer in optimizers:
        for phi in logits & optimizer.state.keys():
            del optimizer.state[phi]
