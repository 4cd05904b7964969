"""States what a network may cost, or how much it may lose.

A target on a cost is a constraint on the logarithm of the expected cost, with a multiplier. Three things make it work
without tuning. First, the multiplier is relative to the loss: it is 1 where the pressure on the gates is, on average,
as large as the gradient of the loss with its noise. Second, the target comes down geometrically, so that the network
can follow it. Third, the multiplier is the exponential of a proportional and an integral part of the error, so that it
answers at once and forgets what is over. `plasticnet.training.controller` computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.tools.reals import real, shown

_COSTS = {"macs": "macs", "params": "parameters", "units": "units", "latency_ms": "latency"}


@dataclass(frozen=True, init=False)
class Budget:
    """The most that a network may cost when it is hardened, or how much loss it may accept to become small.

    Where several targets on costs are given, all of them hold. A target of 1 or less for ``macs``, ``params`` or
    ``units`` is a share of the network that the schedule was given, and a target above 1 is a number. Tensors of one
    number are taken for it.

    A budget of ``loss`` is the other way round. The pressure on parameters and multiply-adds rises for as long as the
    validation loss keeps to its limit. When it exceeds the limit, the gates go back to where they last kept to it.

    Args:
        macs: The multiply-adds for one sample.
        params: The parameters.
        units: The units of all sites.
        latency_ms: The milliseconds of a forward pass, for the batch that `PlasticNet.measure_latency` was given.
        loss: By how much the validation loss may exceed the best one that was seen before the pressure began, or the
            first one after that where none was seen. No other target may be given with it.

    Raises:
        PlasticError: There is no target, or one of another name; a target is not above 0, or ``loss`` is given
            together with others.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(model, (torch.zeros(2, 4),))
        >>> pn.Budget(macs=0.5, params=40).targets(net)
        {'macs': 24.0, 'parameters': 40.0}
    """

    macs: float | None
    params: float | None
    units: float | None
    latency_ms: float | None
    loss: float | None

    def __init__(
        self,
        macs: float | Tensor | None = None,
        params: float | Tensor | None = None,
        units: float | Tensor | None = None,
        latency_ms: float | Tensor | None = None,
        loss: float | Tensor | None = None,
        **unknown: object,
    ) -> None:
        if unknown:
            raise PlasticError(
                f"Budget({', '.join(unknown)}): a budget is of macs (multiply-adds, half as many as floating-point "
                "operations), params, units or latency_ms, or of loss"
            )
        targets = {"macs": macs, "params": params, "units": units, "latency_ms": latency_ms, "loss": loss}
        # The costs of a network are tensors.
        targets = {n: v.item() if isinstance(v, Tensor) and not v.dim() else v for n, v in targets.items()}
        for name, value in targets.items():
            object.__setattr__(self, name, value)
        given = {n: v for n, v in targets.items() if v is not None}
        for name, value in given.items():
            if (number := real(value)) is None or not 0 < number < math.inf:
                raise PlasticError(f"Budget({name}={shown(value)}): a target is a number above 0")
        if not given or (self.loss is not None and len(given) > 1):
            raise PlasticError(
                f"Budget({', '.join(given)}): give targets among {', '.join(_COSTS)}, or loss, the other way round"
            )

    def absolute(self, net: GatedModel) -> Budget:
        """Return the same budget with numbers in the place of shares, for a schedule that begins smaller.

        Args:
            net: The network whose present costs the shares refer to.

        Raises:
            PlasticError: A share comes to 1 or less.
        """
        found = self.targets(net)
        if small := [f"{cost}: {n:.3g}" for cost, n in found.items() if n <= 1 and cost != "latency"]:
            raise PlasticError(f"{self}: the shares come to less than a single one ({', '.join(small)})")
        return replace(self, **{name: found[cost] for name, cost in _COSTS.items() if cost in found})

    def targets(self, net: GatedModel) -> dict[str, float]:
        """Return the most that the network may cost, by the names of costs that `PlasticNet.penalty` takes.

        Args:
            net: The network whose present costs the shares refer to.
        """
        found: dict[str, float] = {}
        for name, cost in _COSTS.items():
            value = getattr(self, name)
            if value is not None:
                relative = value <= 1 and cost != "latency"
                found[cost] = float(value * present(net, cost) if relative else value)
        return found


def present(net: GatedModel, cost: str) -> float:
    """Return what the network costs with all its units that do not sleep, and those single weights that are open.

    Args:
        net: The network.
        cost: "units", "parameters", "macs" or "latency".
    """
    units = net.cost.awake
    return float(net.cost.expected(torch.cat([units, *(w.open.flatten() for w in net.weights.values())]), cost))
