"""Cutting a trained network in one shot, by a score for each unit; and how much each of its sites can lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.budget import Budget
from plasticnet.compact import survivors
from plasticnet.errors import PlasticError
from plasticnet.gates import INITIAL_LOGIT
from plasticnet.projection import most, project, ranks
from plasticnet.scoring import Loss, Scores, left_as_it_was, resolve
from plasticnet.weights import open_weights

if TYPE_CHECKING:
    from plasticnet.net import Optimizers, PlasticNet


def prune_once(
    net: PlasticNet,
    budget: Budget,
    optimizer: Optimizers = None,
    *,
    scores: Scores = "magnitude",
    scope: Literal["global", "uniform"] = "global",
    loss: Loss | None = None,
) -> dict[str, int]:
    """Cut a trained network to a budget at once; returns how many units were closed per site.

    ``budget`` has shares of the network as it is, or absolute targets. ``scores`` is a kind of `pn.scores`, for
    which ``loss`` is there, or a number for each unit, higher for what is to stay: what `pn.scores` returned, say.
    "global" compares them across sites: the best units stay, as many as the budget allows. "uniform" compares them
    within a site, and all sites keep the same share of their units, the largest that the budget allows (each its
    `Site.minimum`). Units are cut by `PlasticNet.resize`, which ``optimizer`` is for; blocks are closed, and
    `compact` removes them.

    Raises `PlasticError`, and changes nothing, at another k than infinity, for a budget of the loss, when even the
    smallest network costs more than the budget, and for what `scores` and `resize` refuse.
    """
    if not math.isinf(net.k):
        raise PlasticError(f"prune_once cuts a trained network at once, at k = infinity; k is {net.k:g}")
    if scope not in ("global", "uniform"):
        raise PlasticError(f"scope={scope!r}: choose one of global, uniform")
    targets = budget.targets(net) if isinstance(budget, Budget) else {}
    if not targets:
        raise PlasticError(f"prune_once takes a budget of costs, such as pn.Budget(macs=0.3), not {budget!r}")
    worth = resolve(net, scores, loss)
    keep = project(net, worth, targets, open_weights(net)) if scope == "global" else _uniform(net, worth, targets)
    sources = _sources(net, keep, worth)
    before = {n: int(s.open.sum()) for n, s in net.sites.items()}
    net.resize(sources, optimizer)
    with torch.no_grad():
        for name, site in net.sites.items():
            closed = ~keep[name][sources.get(name, slice(None))]
            if closed.any():
                site.phi[torch.from_numpy(closed).to(site.phi.device)] = -INITIAL_LOGIT
    return {n: before[n] - now for n, s in net.sites.items() if (now := int(s.open.sum())) < before[n]}


def _sources(net: PlasticNet, keep: Mapping[str, np.ndarray], worth: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """The units to keep, for every site that loses some, as `PlasticNet.resize` wants them."""
    values = {n: mask + 0.4 * ranks(-worth[n]) / len(mask) for n, mask in keep.items()}  # closed ones: below 0.5
    return survivors({n: s.units for n, s in net.sites.items()}, values, 0.5)


def _uniform(net: PlasticNet, worth: Mapping[str, np.ndarray], targets: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The units that stay when every site keeps the same share of them, the largest that the targets allow."""
    sites, weights = net.sites, open_weights(net)

    def kept(share: float) -> dict[str, np.ndarray]:
        masks = {}
        for name, site in sites.items():
            masks[name] = ranks(worth[name]) < max(site.least, math.floor(share * len(site) + 1e-9))
        left = _sources(net, masks, worth)  # with features go channels that nothing else reads
        return {n: np.isin(np.arange(len(mask)), left[n]) if n in left else mask for n, mask in masks.items()}

    def fits(share: float) -> bool:
        pi = torch.from_numpy(np.concatenate([*kept(share).values(), weights]).astype(np.float64)).to(net._like.device)
        return all(float(net._cost.expected(pi, cost)) <= target for cost, target in targets.items())

    shares = sorted({0.0, *(i / len(s) for s in sites.values() for i in range(1, len(s) + 1))})
    if not fits(shares[0]):
        named = ", ".join(f"{target:,.6g} {cost}" for cost, target in targets.items())
        raise PlasticError(f"the budget of {named} cannot be met: the smallest network costs more")
    return kept(shares[most(lambda n: fits(shares[n]), len(shares) - 1)])


# -- sensitivity ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteSensitivity:
    """One site: for each share how many of its ``units`` were closed, and the validation loss then."""

    name: str
    units: int
    closed: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found: the validation ``loss`` with all units open, and for each site that with a share of its
    units closed. Prints as a table."""

    loss: float
    shares: tuple[float, ...]
    sites: tuple[SiteSensitivity, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def columns(self) -> tuple[str, ...]:
        """The heads of the table: site, units, and the shares that are closed."""
        return ("site", "units", *(f"{100 * share:.3g} %" for share in self.shares))

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table."""
        return [(s.name, f"{s.units:,}", *(f"{loss:.4g}" for loss in s.losses)) for s in self.sites]

    def __str__(self) -> str:
        table = [self.columns(), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in table
        ]
        return "\n".join([f"validation loss by the share of a site that is closed; all open: {self.loss:.4g}", *lines])


def sensitivity(
    net: PlasticNet,
    evaluate: Callable[[PlasticNet], float],
    shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9),
    scores: Scores = "magnitude",
    loss: Loss | None = None,
) -> Sensitivity:
    """How much each site can lose: the validation loss when a share of its units is closed, those of the lowest score,
    and all other units are open.

    ``evaluate`` gives the validation loss of the network, a number; it is called in evaluation mode, without
    gradients, once for every site and share. The number of units is rounded, and one stays (of blocks all may go).
    ``scores`` and ``loss`` are those of `prune_once`. The network is left exactly as it was.

    Raises `PlasticError` for a share that is not between 0 and 1, for what `scores` refuses, and when ``evaluate``
    gives no number.
    """
    shares = tuple(float(share) for share in shares)
    if not shares or not all(0 < share < 1 for share in shares):
        raise PlasticError(f"shares={shares}: numbers between 0 and 1, such as (0.25, 0.5)")
    worth = resolve(net, scores, loss)

    def measured() -> float:
        net.eval()
        value = evaluate(net)
        if not isinstance(value, Real | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
            raise PlasticError(f"evaluate returned {value!r}; it gives the validation loss, a number")
        return float(value)

    rows = []
    with left_as_it_was(net), _own_gates(net):
        whole = measured()
        for name, site in net.sites.items():
            closed = [min(round(share * len(site)), len(site) - site.usual_minimum) for share in shares]
            lowest = torch.from_numpy(worth[name].argsort(kind="stable")).to(site.phi.device)
            losses = {0: whole}
            for n in closed:
                if n not in losses:
                    site.phi[lowest[:n]] = -INITIAL_LOGIT
                    losses[n] = measured()
                    site.phi.fill_(INITIAL_LOGIT)
            rows.append(SiteSensitivity(name, len(site), tuple(closed), tuple(losses[n] for n in closed)))
    return Sensitivity(whole, shares, tuple(rows))


@contextmanager
def _own_gates(net: PlasticNet) -> Iterator[None]:
    """Within this context the network, at k = infinity, has other gates, all open, to close and open."""
    before = [(site, site.phi, site.grace) for site in net.sites.values()]
    net._k = math.inf
    try:
        for site, phi, grace in before:
            site.phi = nn.Parameter(torch.full_like(phi, INITIAL_LOGIT), requires_grad=False)
            site.grace = torch.zeros_like(grace)
        yield
    finally:
        for site, phi, grace in before:
            site.phi, site.grace = phi, grace
        net._mean = None  # the gates' ids, by which it is kept, may come again
