"""Finds calls of a model in which it uses what is to be checked, where values decide what it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plasticnet.tools.drawn import random_inputs
from plasticnet.tools.inputs import MORE, Call, copy_inputs
from plasticnet.tools.snapshot import left_as_it_was
from plasticnet.units import Units, family_of

_TRIES = 8  # how many random inputs are tried
_UNREACHED = f"the self-check did not reach it: give inputs that do, too: {MORE}"


def reaching(
    model: nn.Module, calls: Sequence[Call], sites: Mapping[str, Units], steered: bool
) -> tuple[list[Call], set[str]]:
    """Return the calls that the model runs on, with others where these do not reach every family of layers.

    Args:
        model: The model, with random parameters. It is left as it was.
        calls: The calls, of which the first one succeeds.
        sites: The sites.
        steered: Whether values decide what the model uses. If not, no further calls are sought.

    Returns:
        The calls, and the names of the sites that they reach.
    """
    if len(calls) == 1 and not steered:
        return list(calls), set(sites)
    kept: list[Call] = []
    reached: set[str] = set()
    for call in calls:
        with suppress(Exception):  # random parameters may be ones that the model refuses in training
            reached |= _reached(model, call, sites)
            kept.append(call)
    if not steered:
        return kept or list(calls[:1]), set(sites)
    families = {family_of(name) for name in sites}
    for seed in range(_TRIES):
        if families == {family_of(name) for name in reached}:
            break
        torch.default_generator.manual_seed(seed)
        args, kwargs = random_inputs((calls[0].args, calls[0].kwargs), shift=(0.0, 2.0, -2.0)[seed % 3])
        call = replace(calls[0], args=args, kwargs=kwargs)
        with suppress(Exception):
            found = _reached(model, call, sites)
            if not found <= reached:
                kept.append(call)
                reached |= found
    return kept or list(calls[:1]), reached


def unsure(sites: Mapping[str, Units], reached: set[str], bad: Mapping[str, str]) -> dict[str, str]:
    """Return the sites that no call has reached and that must not be trusted, with the reason.

    A site is trusted like the members of its family that were reached, because they have the same layers.

    Args:
        sites: The sites.
        reached: The names of those that were reached.
        bad: The sites that have failed, with the reason.
    """
    judged: dict[str, str | None] = {}
    for name in sites:
        if name in reached:
            judged[family_of(name)] = judged.get(family_of(name)) or bad.get(name)
    left = {name: judged.get(family_of(name), _UNREACHED) for name in sites if name not in reached and name not in bad}
    return {name: reason for name, reason in left.items() if reason is not None}


def _reached(model: nn.Module, call: Call, sites: Mapping[str, Units]) -> set[str]:
    """Return the sites of which a call uses both what produces their units and what reads them."""
    with left_as_it_was(model, training=call.training), _Used(model) as used:
        args, kwargs = copy_inputs((call.args, call.kwargs))
        model(*args, **kwargs)
    found: set[str] = set()
    for name, u in sites.items():
        born = [s.tensor in used.names for s in u.slices if not s.consumed]
        read = [c.tensor in used.names for c in u.consumers]
        if (any(born) or not born) and (any(read) or not read):
            found.add(name)
    return found


class _Used(TorchDispatchMode):
    """Notes the names of the parameters that operations use within this context.

    Args:
        model: The model that holds them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._known = {id(p): name for name, p in model.named_parameters()}
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        self.names.update(self._known[id(t)] for t in leaves if isinstance(t, Tensor) and id(t) in self._known)
        return func(*args, **(kwargs or {}))
