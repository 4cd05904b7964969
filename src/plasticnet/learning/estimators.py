"""Estimators of the gradient of an expected loss over binary gates, as pure functions.

A step runs several passes. Pass 0 trains the weights, with gates z(0); the others, without gradients, give
losses under other gates. From the losses ``f``, shape (passes, rows), an estimator makes d E[f] / d phi,
shape (units,), averaged over the rows (samples, or 1 where the batch shares its gates). Some also take
the slopes ``b``, the gradient of the mean loss with respect to the gates of each row, shape (rows, units):
of pass 0, or of one more pass at the mean gates. Each estimate is linear in (f, b), so its two parts
can be had apart, `Estimator.losses` when the losses are known and `Estimator.slopes` in the backward pass.

All but "straight-through" are unbiased if the loss of a row does not depend on the gates of another.
Notation: pi = sigmoid(k phi), u uniform; d pi / d phi = k pi (1 - pi).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What is drawn in a step, for gates of probability ``pi``, shape (units,): ``u``, some sets of uniform numbers,
    shape (sets, rows, units); and for estimators that flip one unit of every row, which one, ``chosen``
    (rows,), and one over the probabilities of that, ``rarity`` (units,), 0 for units that are never chosen. Without
    ``chosen`` none is flipped."""

    pi: Tensor
    u: Tensor
    chosen: Tensor | None = None
    rarity: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows have gates of their own."""
        return self.u.shape[1]

    def flipping(self, flips: bool) -> Draw:
        """The draw where a coin decides whether it flips units, or another one does."""
        if self.rarity is None or not flips:
            return replace(self, chosen=None)
        return replace(self, rarity=2 * self.rarity)

    def open(self, i: int) -> Tensor:
        """``1[u < pi]`` of set ``i``, shape (rows, units)."""
        return (self.u[i] < self.pi).to(self.pi.dtype)

    def antithetic(self, i: int) -> Tensor:
        """``1[u > 1 - pi]`` of set ``i``: the partner of `open`."""
        return (self.u[i] > 1 - self.pi).to(self.pi.dtype)

    def flipped(self) -> Tensor:
        """`open` of set 0, with the chosen unit of every row the other way round."""
        z = self.open(0)
        if self.chosen is None:
            return z
        chosen = self.chosen[:, None]
        return z.scatter(1, chosen, 1 - z.gather(1, chosen))

    def sparse(self, values: Tensor) -> Tensor:
        """The sum over the rows of ``values`` (rows,) times their unit's rarity, put at the chosen units."""
        if self.chosen is None or self.rarity is None:
            return torch.zeros_like(self.pi)
        return torch.zeros_like(self.pi).index_add(0, self.chosen, values * self.rarity[self.chosen])

    def at_chosen(self, values: Tensor) -> Tensor:
        """Of ``values`` (rows, units) those of the chosen units, shape (rows,); 0 where none is chosen."""
        if self.chosen is None:
            return values.new_zeros(len(values))
        return values.gather(1, self.chosen[:, None])[:, 0]


def arm(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Augment-REINFORCE-merge (Yin & Zhou, arXiv 1807.11143): ``k (f1 - f0) (u - 1/2)``."""
    return k * ((f[1] - f[0])[:, None] * (draw.u[0] - 0.5)).mean(0)


def disarm(draw: Draw, k: float, f: Tensor) -> Tensor:
    """DisARM (Dong et al., arXiv 2006.10680): ARM with u integrated out, never more variance:
    ``k/2 (f0 - f1) (z0 - z1) max(pi, 1 - pi)``."""
    return k * _pair(draw, 0, (f[0] - f[1]) / len(f[0]))


def ar(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Augment-REINFORCE (arXiv 1807.11143): one pass, high variance: ``k f (1 - 2u)``."""
    return k * (f[0][:, None] * (1 - 2 * draw.u[0])).mean(0)


def loorf(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Leave-one-out REINFORCE with two independent draws: ``k/2 (f0 - f1) (z0 - z1)``."""
    return k * 0.5 * ((f[0] - f[1])[:, None] * (draw.open(0) - draw.open(1))).mean(0)


def arms(draw: Draw, k: float, f: Tensor) -> Tensor:
    """ARMS (Dimitriev & Zhou, arXiv 2105.14141) with n passes: leave-one-out REINFORCE over gates whose
    correlation rho is negative, ``k / ((n - 1) (1 - rho)) sum_i (f_i - mean f) z_i``."""
    centred = f - f.mean(0)
    total = sum(c[:, None] * copula(draw, i) for i, c in enumerate(centred))
    assert isinstance(total, Tensor)
    return k * total.mean(0) / (len(f) - 1) / (1 - correlation(draw.pi, len(f)))


def bitflip(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Bitflip-1 (Kunes et al., arXiv 2208.06124): the exact difference that one unit of every row makes,
    ``d pi / d phi (f(z_j = 1) - f(z_j = 0)) / P(j is chosen)``."""
    sign = 2 * draw.at_chosen(draw.open(0)) - 1
    return _slope(draw, k) * draw.sparse(sign * (f[0] - f[-1])) / len(f[0])


def ugc(draw: Draw, k: float, f: Tensor) -> Tensor:
    """Unbiased gradient variance clipping (arXiv 2208.06124): bitflip-1 for gates so certain that its variance is
    the lower one, DisARM for the others."""
    return torch.where(_certain(draw.pi), bitflip(draw, k, f), disarm(draw, k, f))


def disarm_apart(draw: Draw, k: float, f: Tensor) -> Tensor:
    """DisARM from passes 1 and 2, whose gates are independent of those of pass 0."""
    return k * _pair(draw, 1, (f[1] - f[2]) / len(f[0]))


def nothing(draw: Draw, k: float, f: Tensor) -> Tensor:
    """No use of the losses."""
    return torch.zeros_like(draw.pi)


def straight_through(draw: Draw, k: float, b: Tensor) -> Tensor:
    """The slope for the difference (Bengio et al., arXiv 1308.3432): ``d pi / d phi b``. Biased where the loss is
    not linear in the gate."""
    return _slope(draw, k) * b.sum(0)


def linear(i: int) -> Callable[[Draw, float, Tensor], Tensor]:
    """The linear control variate of an antithetic pair made from set ``i``: ``sum_j b_j z_j`` is subtracted from
    both losses, and the gradient of its mean, ``b d pi / d phi``, is added. Unbiased, for b does not depend
    on the pair (at z = pi: MuProp, Gu et al., arXiv 1511.05176)."""

    def slopes(draw: Draw, k: float, b: Tensor) -> Tensor:
        step = draw.open(i) - draw.antithetic(i)
        return straight_through(draw, k, b) - k * _pair(draw, i, (b * step).sum(1))

    return slopes


def local(draw: Draw, k: float, b: Tensor) -> Tensor:
    """The slope as the control variate of `bitflip`: it takes the place of the difference at every unit, and what it
    was wrong by is made good at the chosen one. Unbiased, for the choice does not depend on b. What is left of the
    variance is how much a unit's own difference depends on the others, and, over the probability of the choice, how
    far its slope is from its difference."""
    return straight_through(draw, k, b) - _slope(draw, k) * draw.sparse(draw.at_chosen(b))


def _pair(draw: Draw, i: int, difference: Tensor) -> Tensor:
    """DisARM of the antithetic pair made from set ``i``, over k: summed over the rows."""
    step = draw.open(i) - draw.antithetic(i)
    return 0.5 * (difference[:, None] * step).sum(0) * torch.maximum(draw.pi, 1 - draw.pi)


def _slope(draw: Draw, k: float) -> Tensor:
    return k * draw.pi * (1 - draw.pi)


def copula(draw: Draw, i: int) -> Tensor:
    """The gates of pass ``i`` of ARMS: from a Dirichlet copula, or from its mirror image, whichever has the more
    negative correlation between passes."""
    e = -torch.log1p(-draw.u)
    v = (1 - e[i] / e.sum(0)) ** (len(e) - 1)  # uniform
    return torch.where(_mirrored(draw.pi, len(e)), (v >= 1 - draw.pi).to(v.dtype), (v < draw.pi).to(v.dtype))


def _both(p: Tensor, n: int) -> Tensor:
    """The covariance of 1[v_i < p] and 1[v_j < p] under the Dirichlet copula."""
    return (2 * p ** (1 / (n - 1)) - 1).clamp(min=0) ** (n - 1) - p * p


def _mirrored(pi: Tensor, n: int) -> Tensor:
    return _both(1 - pi, n) < _both(pi, n)


def correlation(pi: Tensor, n: int) -> Tensor:
    """The correlation of a gate between two of ``n`` passes of ARMS, shape (units,): never above 0."""
    covariance = torch.minimum(_both(pi, n), _both(1 - pi, n))
    return (covariance / (pi * (1 - pi)).clamp(min=1e-30)).clamp(max=0)


def _certain(pi: Tensor) -> Tensor:
    """Gates for which the bound on the variance of bitflip-1, ``n m^2 M^2 F^2``, is below that of DisARM,
    ``m M^2 F^2 / 2``, where m = min(pi, 1 - pi), M = 1 - m and F bounds the difference of two losses."""
    return torch.minimum(pi, 1 - pi) < 0.5 / max(len(pi), 1)


def everywhere(pi: Tensor, sizes: Tensor) -> Tensor:
    """Every unit alike."""
    return torch.ones_like(pi)


def where_certain(pi: Tensor, sizes: Tensor) -> Tensor:
    """Units that DisARM leaves to bitflip-1."""
    return _certain(pi).to(pi.dtype)


def where_it_matters(pi: Tensor, sizes: Tensor) -> Tensor:
    """In proportion to ``pi (1 - pi)``, which the difference is multiplied by, over the number of units in the site,
    which share what the site does."""
    return pi * (1 - pi) / sizes


@dataclass(frozen=True)
class Estimator:
    """An estimator and the passes that it needs.

    ``gates(draw, i)`` are those of pass i, for i from 0 to ``partners``; ``sets`` are the sets of uniform
    numbers; ``flips(pi, sizes)`` are weights, shape (units,), by which a unit of every row is chosen,
    with the number of units in the site of each; ``at`` says where the slopes are taken, and ``reads`` the
    losses of which passes are used.
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
        """What a step draws for gates of probability ``pi``, in sites of ``sizes`` units, both (units,); gates that
        are ``shared``, a mask (units,), have one draw for all rows."""
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
        """The estimate, shape (units,), from the losses (passes, rows) and the slopes (rows, units)."""
        estimate = self.losses(draw, k, f)
        return estimate if self.slopes is None or b is None else estimate + self.slopes(draw, k, b)


_MANY = 2**16  # gates, from which on multinomial takes longer than sums; from 2**24 on it refuses


def _choose(weights: Tensor, rows: int) -> Tensor:
    """A unit for every row, by weight (any, where there is none: its rarity is 0), without waiting for a GPU."""
    weights = torch.where(weights.sum() > 0, weights, 1.0)
    if len(weights) <= _MANY:
        return weights.multinomial(rows, replacement=True)
    ends = weights.double().cumsum(0)
    drawn = torch.rand(rows, dtype=ends.dtype, device=ends.device) * ends[-1]
    return torch.searchsorted(ends, drawn, right=True).clamp(max=len(ends) - 1)


def _antithetic(draw: Draw, i: int) -> Tensor:
    return draw.antithetic(0) if i else draw.open(0)


def _apart(draw: Draw, i: int) -> Tensor:
    return draw.antithetic(1) if i == 2 else draw.open(i)


def _flipped(draw: Draw, i: int) -> Tensor:
    return draw.flipped() if i else draw.open(0)


def _clipped(draw: Draw, i: int) -> Tensor:
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
