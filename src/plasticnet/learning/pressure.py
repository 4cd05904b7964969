"""Presses on the gates: what the expected cost of a network is worth, and the limits of single sites.

`Pressure` says what a cost is worth for as long as a network trains, and `penalty` is what that adds to one loss.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial, reduce
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from plasticnet.cost.names import check_names
from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import probabilities
from plasticnet.learning.guard import guarded
from plasticnet.tools.reals import real


@dataclass(frozen=True)
class Pressure:
    """What the expected cost of a network is worth, as a part of the loss in plastic stages.

    Give it to a `Schedule`, and add `Schedule.penalty` to the loss of every training step.

    A linear price is ``strength`` times the cost: the strength is the loss that one unit, parameter, multiply-add or
    millisecond is worth. With ``relative_to`` it is the loss that the whole of that cost is worth, so that one strength
    serves small and large networks. A logarithmic price is ``strength`` times the logarithm of the cost. It is relative
    to what is left by itself.

    Args:
        strength: A number, 0 or more.
        cost: "units", "parameters", "macs" (multiply-adds for one sample) or "latency" (milliseconds, which
            `PlasticNet.measure_latency` makes known). A mapping of these to weights stands for a weighted sum.
        scale: "linear" or "log".
        relative_to: With a linear scale, what each cost is divided by: a network, for what it costs now with all its
            units; a number above 0; or a mapping of the costs to such numbers. Only the numbers are kept. None divides
            by nothing.

    Raises:
        PlasticError: A name is unknown, a number is out of range, the latency was not measured, or ``relative_to``
            does not fit the cost or the scale.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(model, (torch.zeros(2, 4),))
        >>> pn.Pressure(0.5, "parameters", relative_to=net)
        Pressure(strength=0.5, cost='parameters', scale='linear', relative_to=58.0)
        >>> pn.Pressure(0.5, {"macs": 1.0, "parameters": 0.1}, "log").prices
        {'macs': 0.5, 'parameters': 0.05}
    """

    strength: float
    cost: str | Mapping[str, float] = "parameters"
    scale: Literal["linear", "log"] = "linear"
    relative_to: float | Mapping[str, float] | GatedModel | None = None

    def __post_init__(self) -> None:
        if not _strong(self.strength):
            raise PlasticError(f"Pressure(strength={self.strength!r}): the strength is a number, 0 or more")
        if self.scale == "log" and self.relative_to is not None:
            raise PlasticError(
                "Pressure(scale='log', relative_to=...): a logarithm is relative by itself, so that relative_to would "
                "change no gradient. Leave it out, or take scale='linear'"
            )
        try:
            weights = _weights(self.cost, self.scale)
            whole = _whole(weights, self.relative_to)
        except PlasticError as error:
            raise PlasticError(f"Pressure: {error}") from None
        several = isinstance(self.cost, Mapping)
        # What was given may change later, and a network would be kept alive.
        object.__setattr__(self, "cost", dict(self.cost) if isinstance(self.cost, Mapping) else self.cost)
        object.__setattr__(self, "relative_to", whole if whole is None or several else whole[next(iter(weights))])

    @property
    def prices(self) -> dict[str, float]:
        """What each cost, or its logarithm, is multiplied by."""
        whole = _whole(weights := _weights(self.cost, self.scale), self.relative_to)
        strength = float(self.strength)
        return {name: strength * w if whole is None else strength * w / whole[name] for name, w in weights.items()}


def _whole(
    weights: Mapping[str, float], relative_to: float | Mapping[str, float] | GatedModel | None
) -> dict[str, float] | None:
    """Return what each cost is divided by, or None where it is divided by nothing.

    Args:
        weights: The costs of a mixture, with their weights.
        relative_to: As for `Pressure`.

    Raises:
        PlasticError: It is nothing that costs can be divided by, or not one for each cost.
    """
    if relative_to is None:
        return None
    if isinstance(relative_to, GatedModel):
        return {name: float(relative_to.cost.full(name)) for name in weights}
    shown = repr(relative_to) if isinstance(relative_to, Real | Mapping) else f"a {type(relative_to).__name__}"
    if isinstance(relative_to, Real) and len(weights) > 1:
        raise PlasticError(
            f"relative_to={shown} is one number for the costs {', '.join(weights)}: give the network, or a "
            "mapping with a number for each of them"
        )
    given = relative_to if isinstance(relative_to, Mapping) else dict.fromkeys(weights, relative_to)
    if any(not _strong(given.get(name)) or not given[name] for name in weights):
        raise PlasticError(
            f"relative_to={shown}: give None, a PlasticNet, a number above 0, or a mapping with a number above "
            f"0 for each of the costs {', '.join(weights)}"
        )
    return {name: float(given[name]) for name in weights}


def penalty(net: GatedModel, strength: float, cost: str | Mapping[str, float], scale: str) -> Tensor:
    """Return ``strength`` times the expected cost of the network, a scalar that is differentiable in the gates.

    Args:
        net: The network.
        strength: A number, 0 or more.
        cost: The name of a cost, or a mapping of names to weights, for a weighted sum.
        scale: "linear", or "log" for the logarithm of each cost.

    Raises:
        PlasticError: A name is unknown, a number is negative, or the latency has not been measured.
    """
    weights = _weights(cost, scale)
    if not _strong(strength):
        raise PlasticError(f"strength={strength!r}: a penalty's strength is a number, 0 or more")
    return priced(net, {name: float(strength) * w for name, w in weights.items()}, scale)


def priced(net: GatedModel, prices: Mapping[str, float], scale: str) -> Tensor:
    """Return the sum of the expected costs of the network, or of their logarithms, each times its price.

    Args:
        net: The network.
        prices: What each cost is multiplied by; there is at least one.
        scale: "linear" or "log".
    """
    expected: Callable[[str], Tensor] = net.cost.full
    if not (math.isinf(net.k) and net.mean_gates()[1] and net.mean_weights() is None):
        pi = net.cost.weighed(probabilities(net.all_gates(), net.k), [s.strength for s in net.sites.values()])
        expected = partial(net.cost.expected, pi)
    costs = {name: expected(name) for name in prices}
    terms = [price * (costs[name] if scale == "linear" else costs[name].log()) for name, price in prices.items()]
    return guarded(net, reduce(operator.add, terms))


def _weights(cost: str | Mapping[str, float], scale: str) -> dict[str, float]:
    """Return the costs of a mixture whose weight is above 0, with their weights, after checking names and numbers."""
    mixture = list(cost.items()) if isinstance(cost, Mapping) else [(cost, 1.0)]
    for name, weight in mixture:
        check_names(name, scale)
        if not _strong(weight):
            raise PlasticError(f"cost={cost!r}: the weight of {name!r} in the mixture is a number, 0 or more")
    weights = {name: float(weight) for name, weight in mixture if weight}
    if not weights:
        raise PlasticError(f"cost={cost!r}: a mixture needs a cost with a weight above 0, such as {{'macs': 1.0}}")
    return weights


def _strong(value: Any) -> bool:
    """Return whether a value is a finite number, 0 or more."""
    return (number := real(value)) is not None and 0 <= number < math.inf


def limit(net: GatedModel, pattern: str, minimum: int | None, maximum: float, strength: float) -> None:
    """Set the bounds of all sites whose name matches a pattern, in the place of their earlier bounds.

    Args:
        net: The network.
        pattern: A name pattern of sites, as for ``fnmatch``.
        minimum: How many units pruning leaves; None for the usual number (`Site.usual_minimum`).
        maximum: The number of units at which growth stops.
        strength: What the pressure on the gates is multiplied by.

    Raises:
        PlasticError: No site matches, the bounds contradict each other, or the strength is not a number from 0 on.
    """
    matching = [s for n, s in net.sites.items() if fnmatchcase(n, pattern)]
    if not matching:
        raise PlasticError(f"limit: {pattern!r} matches none of the sites: {', '.join(net.sites)}")
    if minimum is not None and (type(minimum) is not int or not 0 <= minimum <= maximum):
        raise PlasticError(f"limit: minimum={minimum}, maximum={maximum}; needed is 0 <= minimum <= maximum")
    if not _strong(strength):
        raise PlasticError(f"limit: strength={strength!r}; what the pressure is multiplied by is a number, 0 or more")
    for site in matching:
        site.minimum = minimum
        site.maximum, site.strength = maximum, float(strength)
