"""Measures how much each site can lose: the validation loss with a share of its units closed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.meanwhile import at_k, own_gates
from plasticnet.gates.site import INITIAL_LOGIT
from plasticnet.net import PlasticNet
from plasticnet.oneshot.scores import Scores, resolve
from plasticnet.tools.inputs import Loss
from plasticnet.tools.progress import Progress
from plasticnet.tools.snapshot import left_as_it_was
from plasticnet.tools.table import format_table


@dataclass(frozen=True)
class SiteSensitivity:
    """The validation losses with several shares of one site closed.

    Args:
        name: The name of the site.
        units: The number of its units.
        closed: How many units were closed, for each share.
        losses: The validation loss with these units closed, for each share.

    Example:
        >>> import plasticnet as pn
        >>> site = pn.SiteSensitivity("0", units=8, closed=(2, 4), losses=(0.5, 0.75))
        >>> dict(zip(site.closed, site.losses))
        {2: 0.5, 4: 0.75}
    """

    name: str
    units: int
    closed: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The validation losses that `sensitivity` has measured; it prints as a table.

    Args:
        loss: The validation loss with all units open.
        shares: The shares of a site that were closed.
        sites: The losses of each site, in the order of the network's sites.

    Example:
        >>> import plasticnet as pn
        >>> site = pn.SiteSensitivity("0", units=8, closed=(2, 4), losses=(0.5, 0.75))
        >>> print(pn.Sensitivity(0.25, (0.25, 0.5), (site,)))
        validation loss by the share of a site that is closed; all open: 0.25
        site  units  25 %  50 %
        0         8   0.5  0.75
    """

    loss: float
    shares: tuple[float, ...]
    sites: tuple[SiteSensitivity, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    def columns(self) -> tuple[str, ...]:
        """Return the heads of the table: site, units, and the shares that are closed."""
        return ("site", "units", *(f"{100 * share:.3g} %" for share in self.shares))

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, with one row for each site."""
        return [(s.name, f"{s.units:,}", *(f"{loss:.4g}" for loss in s.losses)) for s in self.sites]

    def __str__(self) -> str:
        lines = format_table([self.columns(), *self.rows()], right=True)
        return "\n".join([f"validation loss by the share of a site that is closed; all open: {self.loss:.4g}", *lines])


def sensitivity(
    net: PlasticNet,
    evaluate: Callable[[PlasticNet], float],
    shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9),
    scores: Scores = "magnitude",
    loss: Loss | None = None,
) -> Sensitivity:
    """Measure how much each site can lose: the validation loss with a share of its units closed.

    One site at a time is measured. The units with the lowest scores are closed, and all other units of the network are
    open.

    Args:
        net: The network, which is left exactly as it was.
        evaluate: A function that returns the validation loss of the network, a number. It is called in evaluation mode
            and without gradients, once with all units open and once for every site and number of closed units.
        shares: The shares to close, between 0 and 1. The number of units is rounded, and at least one stays; of blocks
            all may go.
        scores: A kind of score or the scores themselves, as in `prune_once`.
        loss: The loss for kinds of score that follow a gradient, as in `pn.scores`.

    Raises:
        PlasticError: A share is not between 0 and 1, the scores are not possible or do not fit, or ``evaluate`` does
            not return a number. Nothing was changed.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> net = pn.PlasticNet(model, (x,))
        >>> found = pn.sensitivity(net, lambda net: torch.nn.functional.cross_entropy(net(x), y), shares=(0.25, 0.5))
        >>> [(site.name, site.closed) for site in found.sites]
        [('0', (2, 4))]
    """
    shares = tuple(float(share) for share in shares)
    if not shares or not all(0 < share < 1 for share in shares):
        raise PlasticError(f"shares={shares}: numbers between 0 and 1, such as (0.25, 0.5)")
    worth = resolve(net, scores, loss)

    def measured() -> float:
        """Return the validation loss with the units closed that are closed now."""
        net.eval()
        value = evaluate(net)
        if not isinstance(value, Real | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
            raise PlasticError(f"evaluate returned {value!r}; it gives the validation loss, a number")
        return float(value)

    numbers = {
        name: [min(round(share * len(site)), len(site) - site.usual_minimum) for share in shares]
        for name, site in net.sites.items()
    }
    rows, total = [], 1 + sum(len({*closed} - {0}) for closed in numbers.values())
    with (
        net.lock, left_as_it_was(net, training=False), at_k(net, math.inf), own_gates(net),
        Progress("measuring sensitivity", total) as progress,
    ):  # fmt: skip
        whole = measured()
        progress.advance()
        for name, site in net.sites.items():
            closed = numbers[name]
            lowest = torch.from_numpy(worth[name].argsort(kind="stable")).to(site.phi.device)
            losses = {0: whole}
            for n in closed:
                if n not in losses:
                    site.phi[lowest[:n]] = -INITIAL_LOGIT
                    losses[n] = measured()
                    progress.advance(f"{name} without {n:,} of {len(site):,}")
                    site.phi.fill_(INITIAL_LOGIT)
            rows.append(SiteSensitivity(name, len(site), tuple(closed), tuple(losses[n] for n in closed)))
    return Sensitivity(whole, shares, tuple(rows))
