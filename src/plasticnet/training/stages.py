"""Stages: what a schedule moves a network through, and what a step of it did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real

from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError


@dataclass(frozen=True)
class Stage:
    """``epochs`` epochs at one ``k`` (0: dropout, finite: plastic, infinity: ordinary training).

    With ``k_end`` a finite k changes from epoch to epoch, geometrically, and is ``k_end`` in the last of two or more.
    The logits stay, so that a rising k polarises the gates.
    """

    epochs: int
    k: float = math.inf
    k_end: float | None = None

    def __post_init__(self) -> None:
        numbers = type(self.epochs) is int and isinstance(self.k, Real) and not isinstance(self.k, bool)
        if not numbers or self.epochs < 0 or not self.k >= 0:
            raise PlasticError(f"Stage(epochs={self.epochs}, k={self.k}): whole epochs and a number, both 0 or more")
        end = self.k_end
        if end is not None and not (isinstance(end, Real) and self.plastic and 0 < float(end) < math.inf):
            raise PlasticError(f"Stage(k={self.k}, k_end={end}): k goes from one finite number above 0 to another")

    @property
    def plastic(self) -> bool:
        """Whether gates learn: k is finite, and not 0."""
        return 0 < self.k < math.inf

    def k_of(self, epoch: int) -> float:
        """The k of one of its epochs, the first one being 0."""
        if self.k_end is None or not epoch:
            return self.k
        return self.k_end if epoch == self.epochs - 1 else self.k * (self.k_end / self.k) ** (epoch / (self.epochs - 1))


@dataclass(frozen=True)
class Change:
    """What `Schedule.step` did: units cut and grown per site, k for the next epoch, and how undecided the gates were at
    the end of this one, before anything changed: ``transition``, the mean of 2 pi (1 - pi)."""

    cut: Mapping[str, int] = field(default_factory=dict)
    grown: Mapping[str, int] = field(default_factory=dict)
    k: float = math.inf
    transition: float = 0.0


def check_hardening(budget: Budget, stages: Sequence[Stage]) -> None:
    """Raise `PlasticError` unless this is a budget, and the network hardens to it."""
    if not isinstance(budget, Budget):
        raise PlasticError(f"budget={budget!r}: write pn.Budget(macs=0.3), say")
    if not any(a.plastic and math.isinf(b.k) for a, b in pairwise(stages)):
        raise PlasticError(
            "a budget is met when the network hardens: let a stage at finite k be followed by one at k = infinity"
        )
