"""Loading a state dict into a network of another size: resize first, then copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from plasticnet import resize
from plasticnet.compact import lengths
from plasticnet.errors import PlasticError
from plasticnet.gates import gate_key
from plasticnet.units import InputUnits, Units
from plasticnet.weights import weight_key

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet


def compare_keys(own: Iterable[str], found: Iterable[str]) -> None:
    """Raise `PlasticError` unless a state dict names the same tensors as the network."""
    missing, extra = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    if missing or extra:
        raise PlasticError(
            f"the state belongs to another architecture: it lacks {missing[:5]}, and has {extra[:5]} on top"
        )


def check_k(k: Any) -> None:
    """Raise `PlasticError` unless this is what `PlasticNet` saves of k: one number, 0 or more."""
    if not isinstance(k, Tensor) or k.numel() != 1 or not float(k) >= 0:
        raise PlasticError(f"the state has k={k!r}; k is one number from 0 to infinity")


def plan_load(net: PlasticNet, state: Mapping[str, Any]) -> resize.Plan:
    """The resize that brings ``net`` to the sizes in ``state``, a `PlasticNet` state dict.

    Raises `PlasticError` naming the tensor and the shapes when no resize does.
    """
    model = net.model
    units: dict[str, Units] = {s.name: s.units for s in net._sites()}
    for name, u in units.items():
        leaves = ("phi", "grace", "features") if isinstance(u, InputUnits) else ("phi", "grace")
        found = [state[f"gates.{gate_key(name)}.{leaf}"] for leaf in leaves]
        if any(not isinstance(t, Tensor) or t.dim() != 1 or len(t) == 0 or len(t) != len(found[0]) for t in found):
            raise PlasticError(f"site {name!r}: its gates in the state are not of one shape (units,)")
    # The values come from the state, so that units may come back where new ones could not.
    growable = {name: u.growable for name, u in units.items()}
    units = {name: replace(u, growable=True) for name, u in units.items()}
    sources: dict[str, list[int]] = {}
    for name, u in units.items():
        size = len(state[f"gates.{gate_key(name)}.phi"])
        if size != u.size and not isinstance(u, InputUnits):
            sources[name] = [*range(min(size, u.size)), *[-1] * max(0, size - u.size)]
    sizes = lengths(model)
    for u in units.values():  # whichever features are open now: the state says which will be
        if isinstance(u, InputUnits):
            columns = u.slices[0]
            sizes[columns.tensor, columns.dim] = u.full
            index = np.arange(u.full)
            whole = replace(u, size=u.full, features=index, slices=[replace(columns, index=index[:, None])])
            units = {**units, u.name: whole}
    planned = resize.plan(units, sizes, sources)
    for name, u in planned.units.items():
        if isinstance(u, InputUnits):
            _plan_features(planned, u, state[f"gates.{gate_key(name)}.features"].cpu().numpy())
    _compare(net, planned, state)
    for name, u in planned.units.items():
        u.growable = growable[name]
    return planned


def _plan_features(planned: resize.Plan, u: InputUnits, array: np.ndarray) -> None:
    integers = np.issubdtype(array.dtype, np.integer)
    if not integers or array[0] < 0 or array[-1] >= u.full or (np.diff(array) <= 0).any():
        raise PlasticError(
            f"site {u.name!r}: its features in the state are not an increasing list within 0 to {u.full - 1}"
        )
    columns = u.slices[0]
    take = np.zeros(len(array), dtype=np.int64)  # whatever: the values are loaded afterwards
    planned.sources[u.name] = planned.takes[columns.tensor, columns.dim] = take
    columns.index = np.arange(len(array))[:, None]
    planned.units[u.name] = replace(u, size=len(array), features=array)


def _compare(net: PlasticNet, planned: resize.Plan, state: Mapping[str, Any]) -> None:
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


def resize_in_place(net: PlasticNet, planned: resize.Plan) -> None:
    """Apply a plan, keeping every Parameter the same object: nothing has been run since it was built
    or the run is over, so that no autograd graph remembers the old shapes."""
    sites = net._sites()
    logits = {s.name: (s.phi, 0.0) for s in sites}
    moved = resize.apply(net.model, planned, logits, weights={w.name: (w.phi, 0.0) for w in net._weights()})
    for old, new in moved.items():
        old.data, old.grad = new.data, None
    resize.replace_tensors(net.model, [(new, old) for old, new in moved.items()])
    for site in sites:
        if site.name in planned.sources:
            site.grace = resize.rewrite(site.grace, {0: planned.sources[site.name]})
