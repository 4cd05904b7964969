"""Presses on the gates: the penalty on what the network is expected to cost, and the limits of single sites."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial, reduce
from numbers import Real
from typing import Any

from torch import Tensor

from plasticnet.cost.names import check_names
from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import probabilities
from plasticnet.learning.guard import guarded


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
    expected: Callable[[str], Tensor] = net.cost.full
    if not (math.isinf(net.k) and net.mean_gates()[1] and net.mean_weights() is None):
        pi = net.cost.weighed(probabilities(net.all_gates(), net.k), [s.strength for s in net.sites.values()])
        expected = partial(net.cost.expected, pi)
    costs = {name: expected(name) for name in weights}
    terms = [strength * w * (costs[name] if scale == "linear" else costs[name].log()) for name, w in weights.items()]
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
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


def limit(net: GatedModel, pattern: str, minimum: int | None, maximum: float, strength: float) -> None:
    """Set the bounds of all sites whose name matches a pattern, in the place of their earlier bounds.

    Args:
        net: The network.
        pattern: A name pattern of sites, as for ``fnmatch``.
        minimum: How many units pruning leaves; None for the usual number, which is 1, and 0 for blocks.
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
        site.minimum = site.usual_minimum if minimum is None else minimum
        site.maximum, site.strength = maximum, float(strength)
