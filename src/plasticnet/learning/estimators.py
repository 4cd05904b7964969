"""Estimates the gradient of an expected loss over binary gates, by pure functions.

A training step runs several passes. Pass 0 trains the weights under the gates z0. The other passes run without
gradients, and give the losses under other gates z1, z2 and so on. An estimator turns the losses ``f``, shape (passes,
rows), into d E[f] / d phi, shape (units,), averaged over the rows. The rows are the samples; where the batch shares its
gates, there is a single row, with the mean loss.

Some estimators also take the slopes ``b``, the gradient of the mean loss with respect to the gates of each row, shape
(rows, units). The slopes are taken in pass 0, or in one more pass at the mean gates. Every estimate is linear in f and
b together, so it is the sum of two parts: `Estimator.losses` is computed when the losses are known, and
`Estimator.slopes` in the backward pass.

All estimators but "straight-through" are unbiased if the loss of a row does not depend on the gates of another row.

In the formulas pi = sigmoid(k phi) is the probability of a gate, hence d pi / d phi = k pi (1 - pi). The numbers u are
uniform on [0, 1), and 1[A] is 1 where A holds and 0 elsewhere. Each formula is that of one row and one gate, and the
estimate is its mean over the rows, for which b already has the factor 1 / rows of the mean loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The random numbers of one step, from which the gates of all its passes follow.

    Attributes:
        pi: The probabilities of the gates, shape (units,).
        u: Sets of uniform numbers, shape (sets, rows, units).
        chosen: The unit that is flipped in each row, shape (rows,). None where no unit is flipped.
        rarity: For every unit, 1 over the probability with which it is chosen, shape (units,). It is 0 for units that
            are never chosen, and None where the estimator flips no units.
    """

    pi: Tensor
    u: Tensor
    chosen: Tensor | None = None
    rarity: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows have gates of their own."""
        return self.u.shape[1]

    def flipping(self, flips: bool) -> Draw:
        """Return the draw to use where a fair coin decides whether this draw flips a unit or another draw does.

        Args:
            flips: Whether the coin fell to this draw. If so, the rarities are doubled, else nothing is flipped.
        """
        if self.rarity is None or not flips:
            return replace(self, chosen=None)
        return replace(self, rarity=2 * self.rarity)

    def open(self, i: int) -> Tensor:
        """Return the gates ``1[u < pi]`` from set ``i``, shape (rows, units)."""
        return (self.u[i] < self.pi).to(self.pi.dtype)

    def antithetic(self, i: int) -> Tensor:
        """Return the gates ``1[u > 1 - pi]`` from set ``i``, the antithetic partners of `open`, shape (rows, units)."""
        return (self.u[i] > 1 - self.pi).to(self.pi.dtype)

    def flipped(self) -> Tensor:
        """Return the gates `open` of set 0 with the chosen unit of every row inverted, shape (rows, units)."""
        z = self.open(0)
        if self.chosen is None:
            return z
        chosen = self.chosen[:, None]
        return z.scatter(1, chosen, 1 - z.gather(1, chosen))

    def sparse(self, values: Tensor) -> Tensor:
        """Return the values of all rows, each times its unit's rarity, added up at the chosen units.

        Args:
            values: One number for each row, shape (rows,).

        Returns:
            Shape (units,); 0 at units that no row has chosen.
        """
        if self.chosen is None or self.rarity is None:
            return torch.zeros_like(self.pi)
        return torch.zeros_like(self.pi).index_add(0, self.chosen, values * self.rarity[self.chosen])

    def at_chosen(self, values: Tensor) -> Tensor:
        """Return the values of the chosen units.

        Args:
            values: Shape (rows, units).

        Returns:
            Shape (rows,); 0 where no unit is flipped.
        """
        if self.chosen is None:
            return values.new_zeros(len(values))
        return values.gather(1, self.chosen[:, None])[:, 0]


def arm(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Augment-REINFORCE-merge (ARM): ``k (f1 - f0) (u - 1/2)``.

    The gates are z0 = 1[u < pi] and z1 = 1[u > 1 - pi]. This is theorem 1 of Yin & Zhou, arXiv 1807.11143.
    """
    return k * ((f[1] - f[0])[:, None] * (draw.u[0] - 0.5)).mean(0)


def disarm(draw: Draw, k: float, f: Tensor) -> Tensor:
    """DisARM: ``k/2 (f0 - f1) (z0 - z1) max(pi, 1 - pi)``.

    The gates are those of `arm`. It is ARM with u integrated out, and never has more variance (Dong, Mnih & Tucker,
    arXiv 2006.10680, section 3).
    """
    return k * _pair(draw, 0, (f[0] - f[1]) / len(f[0]))


def ar(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Augment-REINFORCE (AR): ``k f0 (1 - 2u)``.

    The gates are z0 = 1[u < pi]. It needs a single pass and has a high variance (Yin & Zhou, arXiv 1807.11143, where
    ARM follows from it).
    """
    return k * (f[0][:, None] * (1 - 2 * draw.u[0])).mean(0)


def loorf(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Leave-one-out REINFORCE (LOORF) with two draws: ``k/2 (f0 - f1) (z0 - z1)``.

    The gates z0 and z1 are independent. The name is that of Dimitriev & Zhou, arXiv 2105.14141; the estimator is by
    Kool, van Hoof & Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019).
    """
    return k * 0.5 * ((f[0] - f[1])[:, None] * (draw.open(0) - draw.open(1))).mean(0)


def arms(draw: Draw, k: float, f: Tensor) -> Tensor:
    """ARMS with n passes: ``k / ((n - 1) (1 - rho)) sum_i (f_i - mean f) z_i``.

    It is leave-one-out REINFORCE over gates z_i, made by `copula`, whose correlation rho between two passes is 0 or
    less (Dimitriev & Zhou, arXiv 2105.14141).
    """
    centred = f - f.mean(0)
    total = sum(c[:, None] * copula(draw, i) for i, c in enumerate(centred))
    assert isinstance(total, Tensor)
    return k * total.mean(0) / (len(f) - 1) / (1 - correlation(draw.pi, len(f)))


def bitflip(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Bitflip-1: ``d pi / d phi (f(z_j = 1) - f(z_j = 0)) / P(j is chosen)`` for the chosen unit j, else 0.

    One unit of every row is flipped between two passes, which gives the exact difference that this unit makes (Kunes et
    al., arXiv 2208.06124). The passes are the first and the last of ``f``.
    """
    sign = 2 * draw.at_chosen(draw.open(0)) - 1
    return _slope(draw, k) * draw.sparse(sign * (f[0] - f[-1])) / len(f[0])


def ugc(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Unbiased gradient variance clipping (UGC): `bitflip` where a gate is nearly certain, and `disarm` elsewhere.

    Bitflip-1 takes over where the bound on its variance is below that of DisARM, ``min(pi, 1 - pi) < 1 / (2 units)``
    (Kunes et al., arXiv 2208.06124).
    """
    return torch.where(_certain(draw.pi), bitflip(draw, k, f), disarm(draw, k, f))


def disarm_apart(draw: Draw, k: float, f: Tensor) -> Tensor:
    """DisARM from passes 1 and 2: ``k/2 (f1 - f2) (z1 - z2) max(pi, 1 - pi)``.

    The gates of these passes are independent of those of pass 0, so that the slopes of pass 0 may serve as a control
    variate (see `linear`). The estimator is that of Dong, Mnih & Tucker, arXiv 2006.10680.
    """
    return k * _pair(draw, 1, (f[1] - f[2]) / len(f[0]))


def nothing(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Return 0 for every gate, for an estimator that uses no losses: "straight-through"."""
    return torch.zeros_like(draw.pi)


def straight_through(draw: Draw, k: float, b: Tensor) -> Tensor:
    """Straight-through: ``d pi / d phi b``.

    The slope takes the place of the difference f(z_j = 1) - f(z_j = 0), so the estimate is biased where the loss is not
    linear in the gate (Bengio, Leonard & Courville, arXiv 1308.3432).
    """
    return _slope(draw, k) * b.sum(0)


def linear(i: int) -> Callable[[Draw, float, Tensor], Tensor]:
    """Return the linear control variate for the DisARM estimate of an antithetic pair of passes.

    With the pair z, z' it is ``d pi / d phi b - k/2 (sum_j b_j (z_j - z'_j)) (z - z') max(pi, 1 - pi)``: the linear
    function ``sum_j b_j z_j`` is subtracted from both losses, and the gradient of its mean is added. The estimate is
    unbiased because b does not depend on the pair. With b taken at z = pi, it is the control variate of MuProp (Gu et
    al., arXiv 1511.05176).

    Args:
        i: The set of uniform numbers that the pair is made from.

    Returns:
        A function of a draw, k and the slopes (rows, units) that gives shape (units,).
    """

    def slopes(draw: Draw, k: float, b: Tensor) -> Tensor:
        step = draw.open(i) - draw.antithetic(i)
        return straight_through(draw, k, b) - k * _pair(draw, i, (b * step).sum(1))

    return slopes


def local(draw: Draw, k: float, b: Tensor) -> Tensor:
    """The slope as the control variate of `bitflip`: ``d pi / d phi (b_j - 1[j is chosen] b_j / P(j is chosen))``.

    Together with `bitflip` this makes "bitflip-cv", an estimator of this library (docs/design/estimators.md). The slope
    takes the place of the difference at every unit, and at the chosen unit its error is corrected. The estimate is
    unbiased because the choice does not depend on b. Two things remain in its variance: how much the difference that a
    unit makes depends on the other gates; and how far its slope is from its difference, which counts the more, the less
    likely the unit is chosen.
    """
    return straight_through(draw, k, b) - _slope(draw, k) * draw.sparse(draw.at_chosen(b))


def _pair(draw: Draw, i: int, difference: Tensor) -> Tensor:
    """Return DisARM, divided by k, for the antithetic pair made from set ``i``, summed over the rows.

    Args:
        draw: The draw of the step.
        i: The set of uniform numbers.
        difference: The loss under `Draw.open` less that under `Draw.antithetic`, shape (rows,).
    """
    step = draw.open(i) - draw.antithetic(i)
    return 0.5 * (difference[:, None] * step).sum(0) * torch.maximum(draw.pi, 1 - draw.pi)


def _slope(draw: Draw, k: float) -> Tensor:
    """Return d pi / d phi, shape (units,)."""
    return k * draw.pi * (1 - draw.pi)


def copula(draw: Draw, i: int) -> Tensor:
    """Return the gates of pass ``i`` of ARMS, shape (rows, units).

    They follow from a Dirichlet copula (arXiv 2105.14141) or from its mirror image, whichever makes the correlation
    between passes more negative.
    """
    e = -torch.log1p(-draw.u)
    v = (1 - e[i] / e.sum(0)) ** (len(e) - 1)  # each of these is uniform, and they depend on one another
    return torch.where(_mirrored(draw.pi, len(e)), (v >= 1 - draw.pi).to(v.dtype), (v < draw.pi).to(v.dtype))


def _both(p: Tensor, n: int) -> Tensor:
    """Return the covariance of 1[v_i < p] and 1[v_j < p] under the Dirichlet copula of ``n`` numbers."""
    return (2 * p ** (1 / (n - 1)) - 1).clamp(min=0) ** (n - 1) - p * p


def _mirrored(pi: Tensor, n: int) -> Tensor:
    """Return for which gates the mirror image of the copula has the more negative correlation, shape (units,)."""
    return _both(1 - pi, n) < _both(pi, n)


def correlation(pi: Tensor, n: int) -> Tensor:
    """Return the correlation of each gate between two of ``n`` passes of ARMS, shape (units,). It is never above 0."""
    covariance = torch.minimum(_both(pi, n), _both(1 - pi, n))
    return (covariance / (pi * (1 - pi)).clamp(min=1e-30)).clamp(max=0)


def _certain(pi: Tensor) -> Tensor:
    """Return for which gates the variance of bitflip-1 has a lower bound than that of DisARM, shape (units,).

    The bounds are ``n m^2 M^2 F^2`` and ``m M^2 F^2 / 2``, where n is the number of units, m = min(pi, 1 - pi), M = 1 -
    m, and F bounds the difference of two losses.
    """
    return torch.minimum(pi, 1 - pi) < 0.5 / max(len(pi), 1)


def everywhere(pi: Tensor, sizes: Tensor) -> Tensor:
    """Return equal weights, by which every unit is chosen with the same probability."""
    return torch.ones_like(pi)


def where_certain(pi: Tensor, sizes: Tensor) -> Tensor:
    """Return weights by which only those units are chosen that `ugc` leaves to bitflip-1."""
    return _certain(pi).to(pi.dtype)


def where_it_matters(pi: Tensor, sizes: Tensor) -> Tensor:
    """Return weights ``pi (1 - pi) / units of the site``, by which the units are chosen that matter most.

    The gradient of a gate has the factor pi (1 - pi), and the more units a site has, the less each of them does.
    """
    return pi * (1 - pi) / sizes


@dataclass(frozen=True)
class Estimator:
    """An estimator, and the passes that it needs.

    Attributes:
        losses: The part that follows from the losses: a function of the draw, k and the losses (passes, rows) that
            gives shape (units,).
        gates: ``gates(draw, i)`` gives the gates of pass i, shape (rows, units), for i from 0 to ``partners``.
        partners: How many passes there are beside pass 0.
        sets: How many sets of uniform numbers a draw has.
        flips: ``flips(pi, sizes)`` gives the weights, shape (units,), by which the unit of every row is chosen that is
            flipped; ``sizes`` has, for each unit, the number of units in its site. None where no unit is flipped.
        slopes: The part that follows from the slopes: a function of the draw, k and the slopes (rows, units) that gives
            shape (units,). None where the estimator takes no slopes.
        at: Where the slopes are taken: "training" is pass 0, and "mean" one more pass at the mean gates.
        reads: The passes whose losses are used.
        biased: Whether the estimate is biased.
    """

    losses: Callable[[Draw, float, Tensor], Tensor]
    gates: Callable[[Draw, int], Tensor]
    partners: int = 1
    sets: int = 1
    flips: Callable[[Tensor, Tensor], Tensor] | None = None
    slopes: Callable[[Draw, float, Tensor], Tensor] | None = None
    at: Literal["nothing", "training", "mean"] = "nothing"
    reads: tuple[int, ...] = (0, 1)
    biased: bool = False

    def draw(self, pi: Tensor, sizes: Tensor, rows: int, shared: Tensor | None = None) -> Draw:
        """Draw the random numbers of a step.

        Args:
            pi: The probabilities of the gates, shape (units,).
            sizes: For each gate the number of units in its site, shape (units,).
            rows: How many rows have gates of their own.
            shared: Which gates have one draw for all rows, a mask of shape (units,). None where there are none.
        """
        u = torch.rand(self.sets, rows, len(pi), device=pi.device, dtype=pi.dtype)
        if shared is not None:
            u = torch.where(shared, u[:, :1], u)
        if self.flips is None or not len(pi):
            return Draw(pi, u)
        weights = self.flips(pi, sizes)
        chosen = _choose(weights, rows if shared is None else 1)
        if shared is not None:  # a shared gate is flipped in all rows or in none
            chosen = torch.where(shared[chosen], chosen, _choose(torch.where(shared, 0.0, weights), rows))
        return Draw(pi, u, chosen, torch.where(weights > 0, weights.sum() / weights, 0.0))

    def gradient(self, draw: Draw, k: float, f: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the whole estimate, shape (units,).

        Args:
            draw: The draw of the step.
            k: The k of the step.
            f: The losses under the gates of each pass, shape (passes, rows).
            b: The slopes, shape (rows, units), where the estimator takes them.
        """
        estimate = self.losses(draw, k, f)
        return estimate if self.slopes is None or b is None else estimate + self.slopes(draw, k, b)


# With more gates than these, torch.multinomial takes longer than a cumulative sum, and it refuses more than 2**24.
_MANY = 2**16


def _choose(weights: Tensor, rows: int) -> Tensor:
    """Choose a unit for every row, in proportion to its weight, without waiting for a GPU.

    Where all weights are 0, any unit is chosen, and its rarity of 0 makes that harmless.

    Args:
        weights: Shape (units,).
        rows: How many units are chosen, independently of one another.

    Returns:
        The indices of the units, shape (rows,).
    """
    weights = torch.where(weights.sum() > 0, weights, 1.0)
    if len(weights) <= _MANY:
        return weights.multinomial(rows, replacement=True)
    ends = weights.double().cumsum(0)
    drawn = torch.rand(rows, dtype=ends.dtype, device=ends.device) * ends[-1]
    return torch.searchsorted(ends, drawn, right=True).clamp(max=len(ends) - 1)


def _antithetic(draw: Draw, i: int) -> Tensor:
    """Return the gates of two passes that are an antithetic pair from set 0."""
    return draw.antithetic(0) if i else draw.open(0)


def _apart(draw: Draw, i: int) -> Tensor:
    """Return the gates of pass 0 from set 0, and those of passes 1 and 2 as an antithetic pair from set 1."""
    return draw.antithetic(1) if i == 2 else draw.open(i)


def _flipped(draw: Draw, i: int) -> Tensor:
    """Return the gates of pass 0, and for pass 1 the same ones with one unit of every row flipped."""
    return draw.flipped() if i else draw.open(0)


def _clipped(draw: Draw, i: int) -> Tensor:
    """Return the gates of `ugc`: an antithetic pair in passes 0 and 1, and in pass 2 those of pass 0 with a flip."""
    return draw.flipped() if i == 2 else _antithetic(draw, i)


ESTIMATORS = {
    "arm": Estimator(arm, _antithetic),
    "disarm": Estimator(disarm, _antithetic),
    "ar": Estimator(ar, Draw.open, partners=0, reads=(0,)),
    "loorf": Estimator(loorf, Draw.open, sets=2),
    "arms": Estimator(arms, copula, partners=3, sets=4, reads=(0, 1, 2, 3)),
    "bitflip": Estimator(bitflip, _flipped, flips=everywhere),
    "ugc": Estimator(ugc, _clipped, partners=2, flips=where_certain, reads=(0, 1, 2)),
    "disarm-cv": Estimator(disarm_apart, _apart, partners=2, sets=2, slopes=linear(1), at="training", reads=(1, 2)),
    "disarm-mean": Estimator(disarm, _antithetic, slopes=linear(0), at="mean"),
    "bitflip-cv": Estimator(bitflip, _flipped, flips=where_it_matters, slopes=local, at="training"),
    "straight-through": Estimator(
        nothing, Draw.open, partners=0, slopes=straight_through, at="training", reads=(), biased=True
    ),
}
"""The estimators by name, one of which `PlasticNet` takes as its ``estimator``.

"bitflip-cv" is the default. docs/gates.md compares the variance of all estimators and what a training step costs.

Example:
    >>> import plasticnet as pn
    >>> [name for name, estimator in pn.ESTIMATORS.items() if estimator.biased]
    ['straight-through']
    >>> pn.ESTIMATORS["ugc"].partners
    2
"""
