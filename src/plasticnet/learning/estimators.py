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
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plasticnet.learning.coupling import (
    Draw,
    antithetic,
    apart,
    certain,
    choose,
    clipped,
    copula,
    correlation,
    everywhere,
    flipped,
    where_certain,
    where_it_matters,
)


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
    return torch.where(certain(draw.pi), bitflip(draw, k, f), disarm(draw, k, f))


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
        chosen = choose(weights, rows if shared is None else 1)
        if shared is not None:  # a shared gate is flipped in all rows or in none
            chosen = torch.where(shared[chosen], chosen, choose(torch.where(shared, 0.0, weights), rows))
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


ESTIMATORS = {
    "arm": Estimator(arm, antithetic),
    "disarm": Estimator(disarm, antithetic),
    "ar": Estimator(ar, Draw.open, partners=0, reads=(0,)),
    "loorf": Estimator(loorf, Draw.open, sets=2),
    "arms": Estimator(arms, copula, partners=3, sets=4, reads=(0, 1, 2, 3)),
    "bitflip": Estimator(bitflip, flipped, flips=everywhere),
    "ugc": Estimator(ugc, clipped, partners=2, flips=where_certain, reads=(0, 1, 2)),
    "disarm-cv": Estimator(disarm_apart, apart, partners=2, sets=2, slopes=linear(1), at="training", reads=(1, 2)),
    "disarm-mean": Estimator(disarm, antithetic, slopes=linear(0), at="mean"),
    "bitflip-cv": Estimator(bitflip, flipped, flips=where_it_matters, slopes=local, at="training"),
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
