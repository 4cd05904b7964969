"""Pressure: the penalty on what the gates are expected to cost, and what bounds it site by site."""

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


def penalty(net: GatedModel, strength: float, cost: str | Mapping[str, float], scale: str) -> Tensor:
    """See `PlasticNet.penalty`."""
    weights = _weights(cost, scale)
    if not _strong(strength):
        raise PlasticError(f"strength={strength!r}: a penalty's strength is a number, 0 or more")
    expected: Callable[[str], Tensor] = net.cost.full
    if not (math.isinf(net.k) and net.mean_gates()[1] and net.mean_weights() is None):
        pi = net.cost.weighed(probabilities(net.all_gates(), net.k), [s.strength for s in net.sites.values()])
        expected = partial(net.cost.expected, pi)
    costs = {name: expected(name) for name in weights}
    terms = [strength * w * (costs[name] if scale == "linear" else costs[name].log()) for name, w in weights.items()]
    return reduce(operator.add, terms)


def _weights(cost: str | Mapping[str, float], scale: str) -> dict[str, float]:
    """What each cost counts in a mixture, where it counts anything."""
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
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


def limit(net: GatedModel, pattern: str, minimum: int | None, maximum: float, strength: float) -> None:
    """See `PlasticNet.limit`."""
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
