"""Measures how much each site can lose: the validation loss with a share of its units closed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import at_k
from plasticnet.gates.site import INITIAL_LOGIT
from plasticnet.net import PlasticNet
from plasticnet.oneshot.scores import Scores, resolve
from plasticnet.tools.inputs import Loss
from plasticnet.tools.snapshot import left_as_it_was
from plasticnet.tools.table import format_table


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
        lines = format_table([self.columns(), *self.rows()], right=True)
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
    with left_as_it_was(net, training=False), at_k(net, math.inf), _own_gates(net):
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
    """Within this context the network has other gates, all open, to close and open."""
    before = [(site, site.phi, site.grace) for site in net.sites.values()]
    try:
        for site, phi, grace in before:
            site.phi = nn.Parameter(torch.full_like(phi, INITIAL_LOGIT), requires_grad=False)
            site.grace = torch.zeros_like(grace)
        yield
    finally:
        for site, phi, grace in before:
            site.phi, site.grace = phi, grace
