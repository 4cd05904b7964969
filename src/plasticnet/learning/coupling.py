"""Couples the gates that the passes of one training step have: antithetic pairs, single flips, and copulas.

All gates of a step follow from one `Draw`. The functions of a draw and of the number of a pass give the gates of that
pass, shape (rows, units); each of them serves some of the estimators in `estimators.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


def antithetic(draw: Draw, i: int) -> Tensor:
    """Return the gates of two passes that are an antithetic pair from set 0."""
    return draw.antithetic(0) if i else draw.open(0)


def apart(draw: Draw, i: int) -> Tensor:
    """Return the gates of pass 0 from set 0, and those of passes 1 and 2 as an antithetic pair from set 1."""
    return draw.antithetic(1) if i == 2 else draw.open(i)


def flipped(draw: Draw, i: int) -> Tensor:
    """Return the gates of pass 0, and for pass 1 the same ones with one unit of every row flipped."""
    return draw.flipped() if i else draw.open(0)


def clipped(draw: Draw, i: int) -> Tensor:
    """Return the gates of `ugc`: an antithetic pair in passes 0 and 1, and in pass 2 those of pass 0 with a flip."""
    return draw.flipped() if i == 2 else antithetic(draw, i)


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


def certain(pi: Tensor) -> Tensor:
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
    return certain(pi).to(pi.dtype)


def where_it_matters(pi: Tensor, sizes: Tensor) -> Tensor:
    """Return weights ``pi (1 - pi) / units of the site``, by which the units are chosen that matter most.

    The gradient of a gate has the factor pi (1 - pi), and the more units a site has, the less each of them does.
    """
    return pi * (1 - pi) / sizes


# With more gates than these, torch.multinomial takes longer than a cumulative sum, and it refuses more than 2**24.
_MANY = 2**16


def choose(weights: Tensor, rows: int) -> Tensor:
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
