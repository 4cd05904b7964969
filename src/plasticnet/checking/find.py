"""Finding what can be gated: trace, leave out what is excluded, check, and look at single weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from plasticnet.checking.check import self_check
from plasticnet.checking.weights import gateable
from plasticnet.errors import PlasticError
from plasticnet.tools.inputs import call_arguments
from plasticnet.tracing.trace import trace
from plasticnet.units import Units

Patterns = str | Sequence[str]  # of names, with the wildcards of fnmatch


@dataclass(frozen=True)
class Found:
    """What of a model gets gates.

    ``sites`` are the units by site, ``weights`` the names of the parameters whose entries get gates, ``uses`` how
    often each entry of a parameter is multiplied for one sample, ``frozen`` what cannot be gated and why,
    ``excluded`` the sites that were left out on request, and ``checked`` whether cutting was compared with masking.
    """

    sites: Mapping[str, Units]
    weights: tuple[str, ...]
    uses: Mapping[str, float]
    frozen: Mapping[str, str]
    excluded: tuple[str, ...]
    checked: bool


def find(
    model: nn.Module,
    example_inputs: Any,
    *,
    inputs: Patterns = (),
    exclude: Patterns = (),
    residual: bool = False,
    blocks: Patterns = (),
    weights: Patterns = (),
) -> Found:
    """Find what of a model can be gated; see `PlasticNet` for the options.

    Raises `PlasticError` when the model rejects the example inputs, when a pattern matches nothing, and when there is
    nothing to gate.
    """
    args, kwargs = call_arguments(example_inputs)
    traced = trace(model, example_inputs, inputs=_listed(inputs), residual=residual, blocks=_listed(blocks))
    for pattern in _listed(exclude):
        if not any(fnmatchcase(n, pattern) for n in traced.sites):
            raise PlasticError(f"exclude={pattern!r} matches none of the sites: {', '.join(traced.sites)}")
    excluded = tuple(n for n in traced.sites if any(fnmatchcase(n, p) for p in _listed(exclude)))
    for name in excluded:
        del traced.sites[name]
    traced = self_check(model, traced, args, kwargs)
    tensors, ungated = gateable(model, _listed(weights), args, kwargs)
    if not traced.sites and not tensors:
        reasons = "; ".join(f"{n}: {r}" for n, r in [*ungated.items(), *traced.frozen.items()][:5])
        raise PlasticError(f"{type(model).__name__} has nothing to gate ({reasons or 'no units were found'})")
    frozen = {**traced.frozen, **ungated}
    return Found(traced.sites, tuple(tensors), traced.uses, frozen, excluded, traced.checked)


def _listed(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
