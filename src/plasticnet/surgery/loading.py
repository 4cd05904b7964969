"""Loads a state dict into a network of another size: resizes the network first, and then copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import gate_key, weight_key
from plasticnet.surgery.plan import Plan, lengths, plan_resize
from plasticnet.surgery.resize import adopt
from plasticnet.surgery.rewrite import apply_plan, replace_tensors, rewrite
from plasticnet.units import InputUnits, Units


@contextmanager
def resized_to(net: GatedModel, state: Mapping[str, Any]) -> Iterator[None]:
    """Resize a network to the sizes in a state dict, which is loaded within this context.

    The parameters stay the same objects.

    Raises:
        PlasticError: The state belongs to another architecture. Nothing was changed.
    """
    _compare_keys(net.state_dict().keys(), state.keys())
    _check_k(state["_extra_state"])
    planned = _plan_load(net, state)
    before = [(p, p.shape) for p in net.parameters()]
    _resize_in_place(net, planned)
    adopt(net, planned)
    yield
    if any(p is not q or p.shape != shape for (p, shape), q in zip(before, net.parameters(), strict=True)):
        net.ranks.outgrow()


def _compare_keys(own: Iterable[str], found: Iterable[str]) -> None:
    """Raise `PlasticError` unless a state dict names the same tensors as the network."""
    missing, extra = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    if missing or extra:
        raise PlasticError(
            f"the state belongs to another architecture: it lacks {missing[:5]}, and has {extra[:5]} on top"
        )


def _check_k(k: Any) -> None:
    """Raise `PlasticError` unless this is what `PlasticNet` saves of k: one number, 0 or more."""
    if not isinstance(k, Tensor) or k.numel() != 1 or not float(k) >= 0:
        raise PlasticError(f"the state has k={k!r}; k is one number from 0 to infinity")


def _plan_load(net: GatedModel, state: Mapping[str, Any]) -> Plan:
    """Return the plan of a resize that brings a network to the sizes in a state dict.

    Raises:
        PlasticError: No resize leads to these sizes; the message names the tensor and the shapes.
    """
    model = net.model
    units: dict[str, Units] = {s.name: s.units for s in net.sites.values()}
    for name, u in units.items():
        leaves = ("phi", "grace", "features") if isinstance(u, InputUnits) else ("phi", "grace")
        found = [state[f"gates.{gate_key(name)}.{leaf}"] for leaf in leaves]
        if any(not isinstance(t, Tensor) or t.dim() != 1 or len(t) == 0 or len(t) != len(found[0]) for t in found):
            raise PlasticError(f"site {name!r}: its gates in the state are not of one shape (units,)")
    # Units may come back here even in sites that cannot grow, because the state has their values.
    growable = {name: u.growable for name, u in units.items()}
    units = {name: replace(u, growable=True) for name, u in units.items()}
    sources: dict[str, list[int]] = {}
    for name, u in units.items():
        size = len(state[f"gates.{gate_key(name)}.phi"])
        if size != u.size and not isinstance(u, InputUnits):
            sources[name] = [*range(min(size, u.size)), *[-1] * max(0, size - u.size)]
    sizes = lengths(model)
    for u in units.values():  # It does not matter which features are open now, since the state says which will be.
        if isinstance(u, InputUnits):
            columns = u.slices[0]
            sizes[columns.tensor, columns.dim] = u.full
            index = np.arange(u.full)
            whole = replace(u, size=u.full, features=index, slices=[replace(columns, index=index[:, None])])
            units = {**units, u.name: whole}
    planned = plan_resize(units, sizes, sources)
    for name, u in planned.units.items():
        if isinstance(u, InputUnits):
            _plan_features(planned, u, state[f"gates.{gate_key(name)}.features"].cpu().numpy())
    _compare(net, planned, state)
    for name, u in planned.units.items():
        u.growable = growable[name]
    return planned


def _plan_features(planned: Plan, u: InputUnits, array: np.ndarray) -> None:
    """Add to a plan that an input site will have the features in the state.

    Args:
        planned: The plan, which is changed in place.
        u: The input site, with all of its features.
        array: The features in the state.

    Raises:
        PlasticError: These are not features of the site in increasing order.
    """
    integers = np.issubdtype(array.dtype, np.integer)
    if not integers or array[0] < 0 or array[-1] >= u.full or (np.diff(array) <= 0).any():
        raise PlasticError(
            f"site {u.name!r}: its features in the state are not an increasing list within 0 to {u.full - 1}"
        )
    columns = u.slices[0]
    take = np.zeros(len(array), dtype=np.int64)  # Any values will do, since they are loaded afterwards.
    planned.sources[u.name] = planned.takes[columns.tensor, columns.dim] = take
    columns.index = np.arange(len(array))[:, None]
    planned.units[u.name] = replace(u, size=len(array), features=array)


def _compare(net: GatedModel, planned: Plan, state: Mapping[str, Any]) -> None:
    """Raise `PlasticError` unless the tensors in the state have the shapes that the plan leads to."""
    tensors = {n: (f"model.{n}", t) for n, t in [*net.model.named_parameters(), *net.model.named_buffers()]}
    gates = [(n, (f"gates.{weight_key(n)}.phi", tensors[n][1])) for n in net.weights]
    for name, (key, tensor) in [*tensors.items(), *gates]:
        expected = tuple(len(planned.takes.get((name, d), range(n))) for d, n in enumerate(tensor.shape))
        found = state.get(key)
        if isinstance(found, Tensor) and tuple(found.shape) != expected:
            raise PlasticError(
                f"the state belongs to another architecture: {key.removeprefix('model.')} has shape "
                f"{tuple(found.shape)}, and {expected} here"
            )


def _resize_in_place(net: GatedModel, planned: Plan) -> None:
    """Apply a plan, and keep every Parameter the same object.

    This is possible because no autograd graph remembers the old shapes: either nothing was run yet, or the run is over.
    """
    sites = net.sites.values()
    logits = {s.name: (s.phi, 0.0) for s in sites}
    moved = apply_plan(net.model, planned, logits, weights={w.name: (w.phi, 0.0) for w in net.weights.values()})
    for old, new in moved.items():
        old.data, old.grad = new.data, None
    replace_tensors(net.model, [(new, old) for old, new in moved.items()])
    for site in sites:
        if site.name in planned.sources:
            site.grace = rewrite(site.grace, {0: planned.sources[site.name]})
