"""Decides which units stay, given a score for each, so that the network keeps within its targets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from plasticnet.budgets.ordered import most, ranks
from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.surgery.survivors import by_features_only, read
from plasticnet.units import BlockUnits, InputUnits

UNSPENT = 0.02  # the share of a target that may remain unused when the network hardens


def project(
    net: GatedModel,
    scores: Mapping[str, Tensor | np.ndarray],
    targets: Mapping[str, float],
    weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return which units stay open, and change nothing.

    The units are ranked by their scores across all sites, and as many of the best ones stay as the targets allow. Among
    the other units, the best that still fit are opened again, until no unit is left that would fit. A channel counts as
    no better than the best of its gated features, and a feature as no better than its channel. In any case the units in
    their grace period stay, and as many of the best units of every site as `Site.least` says.

    Args:
        net: The network.
        scores: For every site a score for each unit, shape (units,). A higher score is better.
        targets: The most that the network may cost when it is *cut to the open units*, by the names of costs that
            `PlasticNet.penalty` takes.
        weights: Which of the single weights with gates are open, shape (weights,). None stands for all.

    Returns:
        For every site a boolean mask of shape (units,).

    Raises:
        PlasticError: Scores are missing, have another shape or are not finite; or the smallest network costs more than
            a target.
    """
    units = _Units(net, scores, targets, weights)
    missed = {c: smallest for c, t in targets.items() if (smallest := units.cost(units.kept, c)) > t}
    if missed:
        found = [(s, "ms" if c == "latency" else c, targets[c]) for c, s in missed.items()]
        raise PlasticError(
            "the target cannot be met: the smallest network, with the units that each site must keep, costs "
            f"{', '.join(f'{s:,.6g} {c} (the target is {t:,.6g})' for s, c, t in found)}. A target must be at least "
            "that, unless more can be cut: exclude= less, lower a minimum by net.limit, or give blocks="
            + ("" if set(missed) == {"latency"} else ". A share is a number of 1 or less, such as 0.5")
        )
    z = units.best(units.kept, units.order)
    while len(candidates := units.fitting(z)):
        more = units.best(z, candidates)
        if (more == z).all():  # by rounding, a unit may fit by its price and not by the cost
            break
        z = more
    return units.by_site(z)


def prices(net: GatedModel, targets: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Return what each unit costs in the network as it is, as the sum of its shares of all targets.

    Args:
        net: The network.
        targets: The most that the network may cost, by the names of costs.

    Returns:
        For every site the prices of its units, shape (units,), above 0.
    """
    units = _Units(net, {name: site.phi for name, site in net.sites.items()}, targets, net.open_weights())
    every = np.ones(units.n, dtype=bool)
    found = sum((units.prices(every, cost) / target for cost, target in targets.items()), np.zeros(units.n))
    return units.by_site(np.maximum(found, 1e-12))


class _Units:
    """All units in one vector, in the order of their sites, with the channels and features that depend on each other.

    Args:
        net: The network.
        scores: For every site a score for each unit, shape (units,).
        targets: The most that the network may cost, by the names of costs.
        weights: Which single weights are open, shape (weights,). None stands for all.

    Attributes:
        starts: The place of the first unit of each site.
        n: The number of all units.
        producer: For every feature the place of the channel that it comes from, and -1 for other units.
        follows: Which channels are read through gated features only, and by no norm.
        reading: How many gated features come from a channel, but at least 1.
        order: The places of all units that do not sleep, the best first.
        rank: The position of each unit in this order, those that sleep included.
        asleep: Which units sleep, and so stay closed.
        kept: Which units stay at any cost.
    """

    def __init__(
        self,
        net: GatedModel,
        scores: Mapping[str, Tensor | np.ndarray],
        targets: Mapping[str, float],
        weights: np.ndarray | None = None,
    ) -> None:
        self.net, self.targets = net, targets
        self.weights = np.zeros(0, dtype=bool) if weights is None else weights
        self.sites = dict(net.sites)
        sizes = [len(site) for site in self.sites.values()]
        self.starts = dict(zip(self.sites, np.cumsum([0, *sizes]).tolist(), strict=False))
        self.n = sum(sizes)
        found = [_checked(name, scores, n) for name, n in zip(self.sites, sizes, strict=True)]
        score = np.concatenate([np.zeros(0), *found])
        self._depend()
        features = np.flatnonzero(self.producer >= 0)
        best = np.full(self.n, -np.inf)
        np.maximum.at(best, self.producer[features], score[features])
        effective = np.where(self.follows, np.minimum(score, best), score)
        effective[features] = np.minimum(score[features], score[self.producer[features]])
        # Where scores are equal, all sites lose the same share of their units, instead of one site after the other.
        share = np.concatenate([ranks(e) / max(len(e), 1) for e in np.split(effective, np.cumsum(sizes)[:-1])])
        self.order = np.lexsort((share, -effective))
        self.rank = np.argsort(self.order)
        asleep = [site.asleep.cpu().numpy() for site in self.sites.values()]
        self.asleep = np.concatenate([np.zeros(0, dtype=bool), *asleep])
        self.order = self.order[~self.asleep[self.order]]
        self.kept = self._must()

    def _depend(self) -> None:
        """Find the channel of each feature, and the channels that are read through gated features only."""
        self.producer = np.full(self.n, -1)
        self.follows = np.zeros(self.n, dtype=bool)
        units = {name: site.units for name, site in self.sites.items()}
        for name, u in units.items():
            start = self.starts[name]
            for s in u.slices:
                if isinstance(inputs := units.get(s.tensor), InputUnits):
                    channel = np.full(inputs.full, -1)
                    channel[s.index] = start + np.arange(u.size)[:, None]
                    first = self.starts[s.tensor]
                    here = self.producer[first : first + inputs.size]
                    np.copyto(here, channel[inputs.features], where=channel[inputs.features] >= 0)
            self.follows[start : start + u.size] = by_features_only(u, units)
        self.reading = np.maximum(np.bincount(self.producer[self.producer >= 0], minlength=self.n), 1)

    def _must(self) -> np.ndarray:
        """Return which units stay at any cost, together with the channels and features that they need."""
        graces = [site.grace.cpu().numpy() > 0 for site in self.sites.values()]
        must = np.concatenate([np.zeros(0, dtype=bool), *graces])
        inputs = [n for n, s in self.sites.items() if isinstance(s.units, InputUnits)]
        for name in [n for n in self.sites if n not in inputs]:
            here = self.places(name)
            must[here[np.argsort(self.rank[here])][: self.sites[name].least]] = True
        self._with_channels(must)
        features = self.order[self.producer[self.order] >= 0]
        for channel in np.flatnonzero(must & self.follows):
            mine = features[self.producer[features] == channel]
            if len(mine) and not must[mine].any():
                must[mine[0]] = True
        for name in inputs:  # the features of channels that stay anyway come first
            here = self.places(name)
            ready = (self.producer[here] < 0) | must[self.producer[here]]
            best_first = here[np.lexsort((self.rank[here], ~ready, ~must[here]))]
            must[best_first[: self.sites[name].least]] = True
        self._with_channels(must)
        return must & ~self.asleep

    def places(self, name: str) -> np.ndarray:
        """Return the places of a site's units in the vector."""
        return np.arange(len(self.sites[name])) + self.starts[name]

    def _with_channels(self, z: np.ndarray) -> None:
        """Open the channels of all open features in ``z``, in place."""
        channels = self.producer[np.flatnonzero(z)]
        z[channels[channels >= 0]] = True

    def cut(self, z: np.ndarray) -> np.ndarray:
        """Return which units are left when those that are closed in ``z`` are cut, as `survivors` would do it."""
        left = z | self.kept
        features = np.flatnonzero(left & (self.producer >= 0))
        read = self.kept.copy()
        read[self.producer[features]] = True
        left &= read | ~self.follows
        left[features] &= left[self.producer[features]]
        return left

    def cost(self, z: np.ndarray, cost: str) -> float:
        """Return what the network costs when the units in ``z`` are open and all others are cut."""
        return float(self._expected(z, cost))

    def prices(self, z: np.ndarray, cost: str) -> np.ndarray:
        """Return what each unit adds to the cost of the units that are open in ``z``, which is the gradient."""
        return self._expected(z, cost, gradient=True).numpy()

    def _expected(self, z: np.ndarray, cost: str, gradient: bool = False) -> Tensor:
        """Return the cost of the units in ``z``, a scalar, or its gradient with respect to them, shape (units,)."""
        device = self.net.like.device
        pi = torch.from_numpy(z.astype(np.float64)).to(device).requires_grad_(gradient)
        weights = torch.from_numpy(self.weights.astype(np.float64)).to(device)
        with torch.set_grad_enabled(gradient):
            expected = self.net.cost.expected(torch.cat([pi, weights]), cost)
            return torch.autograd.grad(expected, pi)[0].cpu() if gradient else expected

    def fits(self, z: np.ndarray) -> bool:
        """Return whether the units in ``z`` keep within all targets."""
        return all(self.cost(z, cost) <= target for cost, target in self.targets.items())

    def best(self, z: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return ``z`` with as many more units open as fit, beginning with the first in ``order``."""

        def opened(n: int) -> np.ndarray:
            more = z.copy()
            more[order[:n]] = True
            if order is not self.order:
                self._with_channels(more)
            return self.cut(more)

        return opened(most(lambda n: self.fits(opened(n)), len(order)))

    def fitting(self, z: np.ndarray) -> np.ndarray:
        """Return the places of the closed units that would fit, each by itself, and change a cost; the best come first.

        The cost is linear in each gate, so one gradient gives the price of every unit. A feature opens together with
        its channel. As long as a channel is closed, its open features cost nothing. So all features of closed channels
        are opened at once, and the price of each channel then includes all its features.
        """
        closed = np.flatnonzero(~z & ~self.follows & ~self.asleep)
        channel = self.producer[closed]
        both = (channel >= 0) & ~z[channel]
        ready = z.copy()
        ready[closed[both]] = True
        fit, priced = np.ones(len(closed), dtype=bool), np.zeros(len(closed), dtype=bool)
        for cost, target in self.targets.items():
            price = self.prices(z, cost)
            alone, c = price[closed], channel[both]
            if both.any():
                with_all = self.prices(ready, cost)
                alone[both] += price[c] + (with_all[c] - price[c]) / self.reading[c]
            fit &= alone <= target - self.cost(z, cost)
            priced |= alone > 0
        found = closed[fit & priced]
        return found[np.argsort(self.rank[found])]

    def by_site(self, z: np.ndarray) -> dict[str, np.ndarray]:
        """Return for every site its part of ``z``."""
        return {name: z[self.places(name)] for name in self.sites}


def decide(
    net: GatedModel, targets: Mapping[str, float], given: Mapping[str, Tensor | np.ndarray] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return which units and which single weights stay open.

    Without gates on single weights, this is `project`. With them, units and weights are first ranked together, and as
    many of the best gates as the targets allow decide which weights are open while the units are projected. Then as
    many of the best weights are opened as fit, and units that no open weight reads are closed.

    Args:
        net: The network.
        targets: The most that the network may cost, by the names of costs that `PlasticNet.penalty` takes.
        given: Scores by which they are ranked, for every site a number for each unit, shape (units,), and for every
            gated weight one for each entry, in its shape. By default these are the logits.

    Returns:
        A boolean mask of shape (units,) for every site; and one in the shape of the weight for every gated weight.
    """
    sites = net.weights.values()
    found = {g.name: g.phi for g in net.all_gates()} if given is None else given
    scores = {name: torch.as_tensor(found[name]) for name in net.sites}
    if not sites:
        return project(net, scores, targets), {}
    phi = np.concatenate([torch.as_tensor(found[w.name]).detach().flatten().cpu().double().numpy() for w in sites])
    # Where scores are equal, all tensors lose the same share of their weights, and the smallest weights close first.
    sizes = [net.model.get_parameter(w.name).detach().abs().flatten().cpu().double().numpy() for w in sites]
    best = np.lexsort((np.concatenate([ranks(size) / size.size for size in sizes]), -phi))
    units = _Units(net, scores, targets, np.zeros(phi.size, dtype=bool))

    def opened(n: int, among: np.ndarray = best, others: np.ndarray | None = None) -> np.ndarray:
        weights = np.zeros(phi.size, dtype=bool) if others is None else others.copy()
        weights[among[:n]] = True
        return weights

    def fits(z: np.ndarray, weights: np.ndarray) -> bool:
        units.weights = weights
        return units.fits(z)

    def as_good(n: int) -> np.ndarray:
        z = units.kept.copy()
        z[units.order[: int((score >= phi[best[n - 1]]).sum())] if n else slice(0)] = True
        return z

    def masks(weights: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(weights, np.cumsum([w.phi.numel() for w in sites])[:-1])
        return {w.name: part.reshape(w.phi.shape) for w, part in zip(sites, parts, strict=True)}

    def read_by(z: np.ndarray, weights: np.ndarray) -> np.ndarray:
        device = net.like.device
        left = {name: torch.from_numpy(mask).to(device) for name, mask in masks(weights).items()}
        return read(net, torch.from_numpy(z).to(device), left).cpu().numpy() | units.kept

    score = np.concatenate([np.zeros(0), *(s.detach().cpu().numpy() for s in scores.values())])
    first = opened(most(lambda n: fits(as_good(n), opened(n)), phi.size))
    stays = project(net, scores, targets, first)
    z = np.concatenate([np.zeros(0, dtype=bool), *stays.values()])
    weights = opened(most(lambda n: fits(read_by(z, opened(n)), opened(n)), phi.size))
    z = read_by(z, weights) if z.size else z
    reached = net.cost.reached(torch.from_numpy(z).to(net.like.device)).cpu().numpy()
    spare = best[(reached & ~weights)[best]]
    weights = opened(most(lambda n: fits(z, opened(n, spare, weights)), spare.size), spare, weights)
    return units.by_site(z), masks(weights)


def missing(
    net: GatedModel, keep: Mapping[str, np.ndarray], targets: Mapping[str, float], widths: Mapping[str, int]
) -> dict[str, int]:
    """Return how many more units each site could have, where more than `UNSPENT` of every target remains unused.

    Each number is what the site could have if no other site got any, so that together they are too many.

    Args:
        net: The network.
        keep: Which units stay, as `project` returns it.
        targets: The most that the network may cost, by the names of costs.
        widths: The largest number of units of each site.

    Returns:
        The numbers of units above 0, by the name of the site.
    """
    if net.weights:  # here closed entries of weights can open instead
        return {}
    z = np.concatenate([np.zeros(0, dtype=bool), *keep.values()])
    units = _Units(net, {name: site.phi for name, site in net.sites.items()}, targets)
    room = {cost: target - units.cost(z, cost) for cost, target in targets.items()}
    if any(room[cost] <= UNSPENT * target for cost, target in targets.items()):
        return {}
    prices = {cost: units.prices(z, cost) for cost in targets}
    found = {}
    for name, site in net.sites.items():
        here = units.places(name)
        selects = isinstance(site.units, InputUnits | BlockUnits) or units.follows[here].any()
        if site.units.growable and not selects:
            fit = min(room[cost] / max(float(prices[cost][here].mean()), 1e-9 * room[cost]) for cost in targets)
            found[name] = int(max(0, min(fit, widths[name] - len(site), site.maximum - len(site))))
    return {name: n for name, n in found.items() if n}


def _checked(name: str, scores: Mapping[str, Tensor | np.ndarray], units: int) -> np.ndarray:
    """Return the scores of a site as an array of shape (units,), or raise `PlasticError`."""
    if name not in scores:
        raise PlasticError(f"there are no scores for site {name!r}; one is needed for each of its {units} units")
    given = scores[name]
    array = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    if array.shape != (units,) or not np.isfinite(array).all():
        what = "are not all finite" if array.shape == (units,) else f"have shape {array.shape}"
        raise PlasticError(f"site {name!r}: the scores {what}; needed is a number for each unit, shape ({units},)")
    return array
