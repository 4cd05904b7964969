"""Finds which parts of a model can get gates.

It traces the model, leaves out what the user excludes, checks the rest, and looks at single weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from plasticnet.checking.check import self_check
from plasticnet.checking.compare import DIFFERS, STOPS
from plasticnet.checking.weights import gateable
from plasticnet.errors import PlasticError
from plasticnet.tools.inputs import MORE, Call, Outputs, calls_of
from plasticnet.tools.progress import Progress
from plasticnet.tracing.trace import explore
from plasticnet.units import ExpertUnits, Units, owner, without_lost_inputs

_SCALE = (
    "; with head_dims= the scale of the products of queries and keys must not follow the size of a head, as the "
    "default of F.scaled_dot_product_attention and 1 / sqrt(q.shape[-1]) do: keep it as "
    "self.scale = head_dim ** -0.5, and give it as scale=self.scale; nn.MultiheadAttention takes none, so that its "
    "heads are cut as a whole, without head_dims="
)
Patterns = str | Sequence[str]  # one pattern of names or several, with the wildcards of fnmatch


@dataclass(frozen=True)
class Found:
    """The parts of a model that get gates, and those that do not.

    Attributes:
        sites: The units of each site, by its name.
        weights: The names of the parameters whose entries get gates.
        uses: How often each entry of a parameter is multiplied for one sample, by the parameter's name.
        frozen: The name of everything that cannot be gated, with the reason.
        excluded: The names of the sites that the user left out.
        checked: Whether masking was compared with cutting, which is impossible on the meta device.
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
    more_inputs: Sequence[Any] = (),
    outputs: Outputs | None = None,
    inputs: Patterns = (),
    exclude: Patterns = (),
    residual: bool = False,
    blocks: Patterns = (),
    head_dims: Patterns = (),
    experts: Patterns = (),
    weights: Patterns = (),
) -> Found:
    """Find which parts of a model can be gated.

    Args:
        model: The module, which is left as it was.
        example_inputs: A tuple of arguments, or a dict of keyword arguments, on which the model runs.
        more_inputs: A list of further such tuples and dicts.
        outputs: A function that returns what is read of the model's output, or None for all of it.
        inputs: Name patterns of consumers whose input features are gated one by one.
        exclude: Name patterns of sites to leave alone.
        residual: Whether to gate also what LayerNorm, RMSNorm and their like normalise.
        blocks: Name patterns of modules that are units as a whole.
        head_dims: Name patterns of attention modules in whose heads the dimensions are the units, and not the heads.
        experts: Name patterns of lists or stacks of experts, which are units as a whole.
        weights: Name patterns of modules whose weight gets a gate on every entry.

    Raises:
        PlasticError: The model rejects the example inputs, a pattern matches nothing, or there is nothing to gate.
    """
    calls = calls_of(example_inputs, more_inputs, outputs)
    given = {
        "inputs": inputs, "exclude": exclude, "blocks": blocks, "head_dims": head_dims, "experts": experts,
        "weights": weights,
    }  # fmt: skip
    patterns = {name: _listed(name, value) for name, value in given.items()}
    with Progress(f"gating {type(model).__name__}", total=4) as progress:
        return _found(model, calls, patterns, residual, progress)


def _found(
    model: nn.Module, calls: Sequence[Call], patterns: Mapping[str, tuple[str, ...]], residual: bool, progress: Progress
) -> Found:
    """Return what `find` does, for arguments that were read, and advance the progress after each part of the work."""
    traced, runs = explore(
        model, calls, patterns["inputs"], residual, patterns["blocks"], patterns["head_dims"], patterns["experts"]
    )
    progress.advance("closing and cutting units")
    for pattern in patterns["exclude"]:
        if not any(fnmatchcase(n, pattern) for n in traced.sites):
            raise PlasticError(f"exclude={pattern!r} matches none of the sites: {', '.join(traced.sites)}")
    excluded = tuple(n for n in traced.sites if any(fnmatchcase(n, p) for p in patterns["exclude"]))
    traced.sites = without_lost_inputs({n: u for n, u in traced.sites.items() if n not in excluded})
    traced = self_check(model, traced, runs.calls, progress.advance)
    tensors, ungated = gateable(model, patterns["weights"], calls[0].args, calls[0].kwargs)
    progress.advance("done")
    if not traced.sites and not tensors:
        reasons = "; ".join(f"{n}: {r}" for n, r in [*ungated.items(), *traced.frozen.items()][:5])
        way_out = (
            f"exclude= leaves alone what can be gated, {', '.join(excluded)}: exclude less"
            if excluded
            else "residual=True, or blocks= with the names of modules, may offer more"
        )
        raise PlasticError(
            f"{type(model).__name__} has nothing to gate ({reasons or 'no units were found'}); {way_out}"
        )
    if runs.refused is not None:
        warnings.warn(
            f"{type(model).__name__} does not run in training mode on the example inputs ({runs.refused}), so that "
            f"only evaluation was traced. If it trains on other inputs, give these, too: {MORE}.",
            UserWarning,
            stacklevel=6,
        )
    reasons = {n: _explained(n, r, patterns["head_dims"]) for n, r in traced.frozen.items()}
    frozen = {n: r for n, r in reasons.items() if n not in _routers(traced.sites)} | ungated
    return Found(traced.sites, tuple(tensors), traced.uses, frozen, excluded, traced.checked)


def _routers(sites: Mapping[str, Units]) -> set[str]:
    """Return the names of routers whose rows belong to experts, and whose outputs tracing itself has frozen."""
    return {owner(n.tensor) for u in sites.values() if isinstance(u, ExpertUnits) for n in u.norms}


def _explained(name: str, reason: str, head_dims: Sequence[str]) -> str:
    """Return why something is frozen, with the way out where the dimensions of heads change what attention computes.

    Args:
        name: The name of what is frozen.
        reason: What the self-check says.
        head_dims: Name patterns of the modules in whose heads the dimensions are the units.
    """
    parts = name.partition("#")[0].split(".")
    within = [".".join(parts[: n + 1]) for n in range(len(parts))]
    asked = any(fnmatchcase(module, pattern) for module in within for pattern in head_dims)
    found = reason in DIFFERS or reason.startswith(STOPS)
    return f"{reason}{_SCALE}" if asked and found else reason


def _listed(name: str, patterns: Patterns) -> tuple[str, ...]:
    """Return the patterns of an argument as a tuple, even if a single one was given."""
    if isinstance(patterns, str):
        return (patterns,)
    listed = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if not all(isinstance(pattern, str) for pattern in listed):
        raise PlasticError(f'{name}={patterns!r}: one name pattern or several, such as {name}=["layer1.*"]')
    return listed
