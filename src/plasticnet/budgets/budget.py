"""Budget: what the network may cost, or lose, and the pressure that brings it there.

A target on cost is a constraint with a multiplier, on the logarithm of the expected cost. Three things make it work
without tuning. The multiplier is relative to the loss: one at which the pressure on the gates is, on
average, as large as the gradient of the loss (with its noise) counts as 1. The target comes down
geometrically, so that the network follows it instead of falling. And the multiplier is the exponential of a
proportional and an integral part of the error, so that it answers at once, and forgets.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from numbers import Real

import torch

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel

_COSTS = {"macs": "macs", "params": "parameters", "units": "units", "latency_ms": "latency"}


@dataclass(frozen=True)
class Budget:
    """The most that the network may cost when it is hardened, or the loss that it may take to be small.

    ``macs`` (for one sample), ``params`` and ``units`` are shares of the network as it was given to
    the schedule, from 0 to 1, or above 1 absolute; ``latency_ms`` is in milliseconds, for the batch of
    `PlasticNet.measure_latency`. Of several, all hold. ``loss`` is by how much the validation loss may
    exceed the best one seen before the pressure begins (or else the first one then): the pressure, on
    parameters and MACs, rises for as long as it does not; when it does, gates go back to where they last did not.

    Raises `PlasticError` when there is no target, one is not positive, or ``loss`` stands beside others.
    """

    macs: float | None = None
    params: float | None = None
    units: float | None = None
    latency_ms: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        given = {n: v for n, v in asdict(self).items() if v is not None}
        for name, value in given.items():
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
                raise PlasticError(f"Budget({name}={value!r}): a target is a number above 0")
        if not given or (self.loss is not None and len(given) > 1):
            raise PlasticError(
                f"Budget({', '.join(given)}): give targets among {', '.join(_COSTS)}, or loss, the other way round"
            )

    def absolute(self, net: GatedModel) -> Budget:
        """The same budget with its shares, of ``net`` as it is, as numbers: for a schedule that begins smaller.

        Raises `PlasticError` when that is less than one.
        """
        found = self.targets(net)
        if small := [f"{cost}: {n:.3g}" for cost, n in found.items() if n <= 1 and cost != "latency"]:
            raise PlasticError(f"{self}: the shares come to less than a single one ({', '.join(small)})")
        return replace(self, **{name: found[cost] for name, cost in _COSTS.items() if cost in found})

    def targets(self, net: GatedModel) -> dict[str, float]:
        """The most that the network may cost, by the names of `PlasticNet.penalty`; shares are of ``net`` as it is."""
        found: dict[str, float] = {}
        for name, cost in _COSTS.items():
            value = getattr(self, name)
            if value is not None:
                relative = value <= 1 and cost != "latency"
                found[cost] = float(value * present(net, cost) if relative else value)
        return found


def present(net: GatedModel, cost: str) -> float:
    """What the network costs with all units that are there, and the single weights that are open."""
    units = torch.ones(sum(map(len, net.sites.values())), dtype=torch.float64, device=net.like.device)
    return float(net.cost.expected(torch.cat([units, *(w.open.flatten() for w in net.weights.values())]), cost))
