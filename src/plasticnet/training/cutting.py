"""Cutting: what a schedule does to the units of a network at the end of an epoch, and when the network hardens.

In a plastic stage units that hibernate are cut, and sites that lost too many get some back; a budget has its say in
both. On hardening the units that stay are decided by the budget, or else by pi, and all others are cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.optim import Optimizer

from plasticnet.budgets.projection import decide, missing, project
from plasticnet.errors import PlasticError
from plasticnet.gates.site import INITIAL_LOGIT, OPEN_LOGIT, set_logits
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import forget
from plasticnet.surgery.survivors import survivors, to_keep
from plasticnet.training.controller import Controller

# A cut takes a small part of a training step, but what was compiled or wrapped must be built anew.
PAYS = 0.02  # the share of the MACs or of the parameters from which on it is worth it


def recover(net: PlasticNet, optimizers: Sequence[Optimizer]) -> None:
    """Start the best gates anew where a site has fewer open than it must. The optimizers forget what has pressed
    them down, but not how large their gradients are, or their next step would be of any length."""
    for site in net.sites.values():
        if int(site.open.sum()) < min(site.minimum, len(site)):
            units = torch.from_numpy(site.likely(site.minimum)).to(site.phi.device)
            set_logits(site, units, OPEN_LOGIT / net.k)
            forget(optimizers, site.phi, units)


def kept_to_loss(net: PlasticNet, optimizers: Sequence[Optimizer], controller: Controller | None) -> bool:
    """Whether the loss is within its budget; if not, the gates go back to where they were when it was, for which
    nothing may be cut."""
    if controller is None:
        return True
    if controller.within:
        if not math.isnan(controller.begun):
            controller.remember(net)
        return True
    for g in net.all_gates():
        logits = controller.good.get(g.name)
        if logits is not None and g.phi.shape == logits.shape:  # else somebody has resized it
            with torch.no_grad():
                g.phi.copy_(logits)
            forget(optimizers, g.phi, torch.ones_like(g.phi, dtype=torch.bool))
    return False


def cut_hibernating(
    net: PlasticNet,
    optimizers: Sequence[Optimizer],
    controller: Controller | None,
    *,
    hibernate: float,
    multiple_of: int,
) -> dict[str, int]:
    """Cut the units with pi below ``hibernate``, if that pays; returns how many, for each site that lost some. Enough
    stay for the targets of the controller."""
    if controller is not None:
        controller.notice(net)
    keep = to_keep(net, hibernate, multiple_of)
    if keep and controller is not None and controller.targets:
        keep = _with_enough(net, keep, controller.targets, multiple_of)
    if not pays(net, keep):
        return {}
    sizes = {name: len(site) for name, site in net.sites.items()}
    net.resize(keep, optimizers)
    if controller is not None:
        controller.remember(net)
    return _changes(net, sizes)[0]


def _with_enough(
    net: PlasticNet, keep: dict[str, list[int]], targets: Mapping[str, float], multiple_of: int
) -> dict[str, list[int]]:
    """``keep``, and those of the best units that come up to the budget."""
    sites = net.sites
    try:
        values = project(net, {n: s.phi for n, s in sites.items()}, targets, net.open_weights())
    except PlasticError:  # what is held open alone costs more
        return keep
    for name, site in sites.items():
        stays = values[name].copy()
        stays[keep.get(name, slice(None))] = True
        values[name] = np.where(stays, 1.0, 0.4 * site.probability(net.k).detach().cpu().numpy())
    return survivors({n: s.units for n, s in sites.items()}, values, 0.5, multiple_of)


def pays(net: PlasticNet, keep: Mapping[str, list[int]]) -> bool:
    """Whether keeping only these units makes the network smaller by a share of `PAYS`."""
    if not keep:
        return False
    sites = net.sites.items()
    kept = [np.isin(np.arange(len(site)), keep.get(name, range(len(site)))) for name, site in sites]
    then = torch.from_numpy(np.concatenate(kept)).to(next(iter(net.parameters())).device, torch.float32)
    cost, now = net.cost.expected, torch.ones_like(then)
    return any(float(cost(then, c)) <= (1 - PAYS) * float(cost(now, c)) for c in ("macs", "parameters"))


def harden(
    net: PlasticNet, optimizers: Sequence[Optimizer], controller: Controller | None, multiple_of: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Cut all closed units of a network at k = infinity, where the controller has targets those that it does not want.
    Returns how many units were cut and added, for each site where some were."""
    sizes = {name: len(site) for name, site in net.sites.items()}
    for site in net.sites.values():
        site.grace.zero_()
    if controller is not None and controller.targets:
        _open_the_wanted(net, optimizers, controller)
    net.prune(0.5, optimizers, multiple_of)
    for site in net.sites.values():  # the units that a site keeps as its minimum are there to be used
        if int(site.open.sum()) < site.minimum:
            set_logits(site, torch.from_numpy(site.likely(site.minimum)).to(site.phi.device), INITIAL_LOGIT)
    return _changes(net, sizes)


def _open_the_wanted(net: PlasticNet, optimizers: Sequence[Optimizer], controller: Controller) -> None:
    """Open the gates that the targets ask for, and close the others. Units are added where more were cut before than
    the targets ask for."""
    units, weights = decide(net, controller.targets)
    if counts := missing(net, units, controller.targets, controller.widths):
        _add_last(net, optimizers, counts)
        units, weights = decide(net, controller.targets)
    wanted = {**units, **weights}
    for g in net.all_gates():
        stays = torch.from_numpy(wanted[g.name]).to(g.phi.device)
        set_logits(g, stays & ~g.open, INITIAL_LOGIT)
        set_logits(g, ~stays & g.open, -INITIAL_LOGIT)


def _add_last(net: PlasticNet, optimizers: Sequence[Optimizer], counts: Mapping[str, int]) -> None:
    """Add new units that come after all others."""
    lowest = float(net.phi().detach().min()) - 1
    sizes = {name: len(net.sites[name]) for name in counts}
    net.grow(counts, optimizers)
    for name, size in sizes.items():
        set_logits(net.sites[name], slice(size, None), lowest)


def _changes(net: PlasticNet, sizes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """How many units each site has lost, and how many it has gained, since it had these sizes."""
    more = {name: len(site) - sizes[name] for name, site in net.sites.items()}
    return {name: -n for name, n in more.items() if n < 0}, {name: n for name, n in more.items() if n > 0}


def forget_gates(net: PlasticNet, optimizers: Sequence[Optimizer]) -> None:
    """Let the optimizers forget all that they remember of the gates: it belongs to another k."""
    logits = {g.phi for g in net.all_gates()}
    for optimizer in optimizers:
        for phi in logits & optimizer.state.keys():
            del optimizer.state[phi]
