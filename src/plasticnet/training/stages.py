"""Stages: what a schedule moves a network through, and what one step of it has done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from plasticnet.errors import PlasticError
from plasticnet.tools.reals import real, shown


@dataclass(frozen=True)
class Stage:
    """A number of epochs at one k, or at a k that changes from epoch to epoch.

    At k = 0 the gates are dropout, at a finite k they learn (the stage is *plastic*), and at infinity the network
    trains ordinarily. With ``k_end`` the k of the epochs is a geometric series. The logits stay when k changes within a
    stage, so that a rising k polarises the gates.

    Args:
        epochs: The number of epochs, 0 or more.
        k: The k of the first epoch, and of all epochs without ``k_end``.
        k_end: The k of the last epoch, where there are two or more; a finite number above 0, as ``k`` must then be too.

    Raises:
        PlasticError: The number of epochs or a k is out of range.

    Example:
        >>> import plasticnet as pn
        >>> stage = pn.Stage(3, k=2.0, k_end=8.0)
        >>> [stage.k_of(epoch) for epoch in range(stage.epochs)]
        [2.0, 4.0, 8.0]
        >>> pn.Stage(10).plastic
        False
    """

    epochs: int
    k: float = math.inf
    k_end: float | None = None

    def __post_init__(self) -> None:
        k, epochs = real(self.k), self.epochs
        if type(epochs) is not int or epochs < 0 or k is None or not k >= 0:
            raise PlasticError(
                f"Stage(epochs={shown(epochs)}, k={shown(self.k)}): whole epochs and a number, both 0 or more"
            )
        end = real(self.k_end)
        if self.k_end is not None and (end is None or not (self.plastic and 0 < end < math.inf)):
            raise PlasticError(
                f"Stage(k={self.k}, k_end={shown(self.k_end)}): k goes from one finite number above 0 to another"
            )

    @property
    def plastic(self) -> bool:
        """Whether the gates learn: k is finite, and not 0."""
        return 0 < self.k < math.inf

    def k_of(self, epoch: int) -> float:
        """Return the k of one of the stage's epochs, counted from 0."""
        if self.k_end is None or not epoch:
            return self.k
        return self.k_end if epoch == self.epochs - 1 else self.k * (self.k_end / self.k) ** (epoch / (self.epochs - 1))


@dataclass(frozen=True)
class Change:
    """A record of what one call of `Schedule.step` has done.

    Args:
        cut: How many units were cut, for each site that lost some.
        grown: How many units were added, for each site that got some. A site in which units were replaced is in both.
        k: The k of the next epoch.
        transition: How undecided the gates were at the end of the epoch, before anything changed: the mean of 2 pi (1 -
            pi) over all gates (NPN, section 3).

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> net = pn.PlasticNet(model, (torch.randn(2, 4),))
        >>> optimizer = torch.optim.Adam(net.param_groups(lr=0.01))
        >>> schedule = pn.Schedule(net, optimizer, [pn.Stage(1), pn.Stage(1, k=7.0)])
        >>> schedule.step()
        Change(cut={}, grown={}, k=7.0, transition=0.0)
    """

    cut: Mapping[str, int] = field(default_factory=dict)
    grown: Mapping[str, int] = field(default_factory=dict)
    k: float = math.inf
    transition: float = 0.0
