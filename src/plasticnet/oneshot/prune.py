"""Cuts a trained network in one shot, by a score for each unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from plasticnet.budgets.budget import Budget
from plasticnet.budgets.ordered import most, ranks
from plasticnet.budgets.projection import decide, prices, project
from plasticnet.errors import PlasticError
from plasticnet.gates.site import INITIAL_LOGIT
from plasticnet.net import PlasticNet
from plasticnet.oneshot.scores import Scores, by_cost, resolve
from plasticnet.surgery.optimizers import Optimizers, listed
from plasticnet.surgery.survivors import survivors
from plasticnet.surgery.undo import undone_on_error
from plasticnet.tools.batches import Forward
from plasticnet.tools.gradients import outside_inference_mode
from plasticnet.tools.inputs import Loss, Outputs


@outside_inference_mode()
def prune_once(
    net: PlasticNet,
    budget: Budget,
    optimizer: Optimizers = None,
    *,
    scores: Scores = "auto",
    scope: Literal["global", "uniform"] = "global",
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    outputs: Outputs | None = None,
    per_cost: bool | None = None,
    cut: bool = True,
) -> dict[str, int]:
    """Cut a trained network to a budget at once.

    Where single weights have gates, their entries are ranked together with the units; those that do not stay are
    closed, so that they are zero in the compact module.

    Units are cut by `PlasticNet.resize`, unless they are only to be closed. Blocks are only closed, and
    `PlasticNet.compact` removes them.

    Args:
        net: The network, at k = infinity.
        budget: The targets on costs, as shares of the network's present costs or as absolute numbers.
        optimizer: The optimizer, or all of those, that hold the parameters, if training goes on.
        scores: A kind of score as in `pn.scores`, or for each site the scores of its units, shape (units,), such as
            `pn.scores` returned. The units with the highest scores stay. Single weights that are not in it stay, too.
            "auto" is "fisher" where there is a loss or there are batches, and "magnitude" where there is neither.
        scope: "global" compares scores across sites, so that the best units of the network stay, as many as the budget
            allows. "uniform" compares them within each site: all sites keep the same share of their units, the largest
            that the budget allows, and at least `Site.minimum` of them; single weights stay as they are.
        loss: The loss for kinds of score that follow a gradient, as in `pn.scores`.
        batches: Inputs for "fisher" without labels, as in `pn.scores`.
        forward: What runs the network on a batch, as in `pn.scores`.
        outputs: What counts in the output, as in `pn.scores`.
        per_cost: Whether scores are divided by what a unit costs, in the costs of the budget, before they are compared
            across sites. By default those of "fisher" and "repair" are, also where `pn.scores` has returned them.
        cut: Whether closed units are cut. If not, they are only closed, so that `pn.repair` can mend the network before
            `PlasticNet.prune` cuts them.

    Returns:
        How many units were closed, for each site that lost some.

    Raises:
        PlasticError: k is not infinity, the budget has no targets on costs, the smallest network costs more than the
            budget, the scores are not possible or do not fit, or the optimizers cannot be resized. Nothing was changed,
            as when the call is interrupted.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> net = pn.PlasticNet(model, (torch.randn(2, 4),))
        >>> pn.prune_once(net, pn.Budget(units=0.25))
        {'0': 6}
        >>> net.compact()[0]
        Linear(in_features=4, out_features=2, bias=True)
    """
    if not math.isinf(net.k):
        raise PlasticError(f"prune_once cuts a trained network at once, at k = infinity; k is {net.k:g}")
    if scope not in ("global", "uniform"):
        raise PlasticError(f"scope={scope!r}: choose one of global, uniform")
    targets = budget.targets(net) if isinstance(budget, Budget) else {}
    if not targets:
        raise PlasticError(f"prune_once takes a budget of costs, such as pn.Budget(macs=0.3), not {budget!r}")
    if isinstance(scores, str) and scores == "auto":
        scores = "magnitude" if loss is None and batches is None else "fisher"
    worth = resolve(net, scores, loss, **_data(batches, forward, outputs))
    if per_cost is None:
        per_cost = by_cost(scores)
    if scope == "global" and per_cost:
        costs = {**prices(net, targets), **_entry_prices(net, targets)}
        worth = {n: value / costs[n] for n, value in worth.items()}
    left: dict[str, np.ndarray] = {}
    if scope == "uniform":
        keep = _uniform(net, worth, targets)
    elif all(name in worth for name in net.weights):
        keep, left = decide(net, targets, worth)
    else:
        keep = project(net, worth, targets, net.open_weights())
    sources = _sources(net, keep, worth) if cut else {}
    before = {n: int(s.open.sum()) for n, s in net.sites.items()}
    with net.lock, undone_on_error(net, listed(optimizer), [net.sampler]), torch.no_grad():
        for name, kept in left.items():
            phi = net.weights[name].phi
            phi[torch.from_numpy(~kept).to(phi.device)] = -INITIAL_LOGIT
        if cut:
            net.resize(sources, optimizer)
        for name, site in net.sites.items():
            closed = ~keep[name][sources.get(name, slice(None))]
            if closed.any():
                site.phi[torch.from_numpy(closed).to(site.phi.device)] = -INITIAL_LOGIT
    return {n: before[n] - now for n, s in net.sites.items() if (now := int(s.open.sum())) < before[n]}


def _entry_prices(net: PlasticNet, targets: Mapping[str, float]) -> dict[str, float]:
    """Return what an entry of each gated weight costs, as the sum of its shares of all targets."""
    each = {cost: net.cost.entry_costs(cost) for cost in targets}
    return {
        w.name: max(sum(each[cost][i] / target for cost, target in targets.items()), 1e-12)
        for i, w in enumerate(net.weights.values())
    }


def _data(batches: Iterable[Any] | None, forward: Forward | None, outputs: Outputs | None) -> dict[str, Any]:
    """Return the arguments of `pn.scores` for inputs without labels."""
    return {} if batches is None else {"batches": batches, "forward": forward, "outputs": outputs}


def _sources(net: PlasticNet, keep: Mapping[str, np.ndarray], worth: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Return the units to keep, for every site that loses some, in the form that `PlasticNet.resize` takes."""
    # The values of closed units stay below 0.5, and say which of them is the best.
    values = {n: mask + 0.4 * ranks(-worth[n]) / len(mask) for n, mask in keep.items()}
    return survivors({n: s.units for n, s in net.sites.items()}, values, 0.5)


def _uniform(net: PlasticNet, worth: Mapping[str, np.ndarray], targets: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Return the units that stay when all sites keep the same share of them, the largest that the targets allow."""
    sites, weights = net.sites, net.open_weights()

    def kept(share: float) -> dict[str, np.ndarray]:
        masks = {}
        for name, site in sites.items():
            masks[name] = ranks(worth[name]) < max(site.least, math.floor(share * len(site) + 1e-9))
        # Channels that only closed features read go with them.
        left = _sources(net, masks, worth)
        return {n: np.isin(np.arange(len(mask)), left[n]) if n in left else mask for n, mask in masks.items()}

    def fits(share: float) -> bool:
        pi = torch.from_numpy(np.concatenate([*kept(share).values(), weights]).astype(np.float64)).to(net.like.device)
        return all(float(net.cost.expected(pi, cost)) <= target for cost, target in targets.items())

    shares = sorted({0.0, *(i / len(s) for s in sites.values() for i in range(1, len(s) + 1))})
    if not fits(shares[0]):
        named = ", ".join(f"{target:,.6g} {cost}" for cost, target in targets.items())
        raise PlasticError(f"the budget of {named} cannot be met: the smallest network costs more")
    return kept(shares[most(lambda n: fits(shares[n]), len(shares) - 1)])
