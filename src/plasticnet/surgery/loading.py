"""Loads a state dict into a network of another size: resizes the network first, and then torch copies.

Torch calls `prepare` when it comes to the network, whether it loads the network itself or a module that contains it.
Everything that can be wrong is found before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import buffer_key, gate_key, weight_key
from plasticnet.surgery.plan import Plan, lengths, plan_resize
from plasticnet.surgery.resize import adopt
from plasticnet.surgery.rewrite import apply_plan, replace_tensors, rewrite
from plasticnet.tools.fsdp_private import give_parts
from plasticnet.tools.gradients import trainable
from plasticnet.tools.inputs import MORE
from plasticnet.tools.sharding import Shards, distributed, gathered, held_parameters, is_sharded
from plasticnet.tools.torch_private import give_shape
from plasticnet.units import IDLE, InputUnits, Units


def prepare(net: GatedModel, state: MutableMapping[str, Any], prefix: str, assign: bool) -> None:
    """Resize a network to the sizes in a state dict, from which torch then copies.

    The parameters stay the same objects, unless they are to be replaced by those in the state.

    Args:
        net: The network.
        state: A state dict of the network or of a module that contains it. Buffers that torch does not know are taken
            out of it, and with ``assign`` other entries are replaced in it.
        prefix: What the names of the network's entries begin with. Where there are none within a larger module, nothing
            is done: torch misses them, if it is to be strict.
        assign: Whether the parameters are to be replaced.

    Raises:
        PlasticError: The state does not fit the network. Nothing was changed.
    """
    if wrong := [key for key in state if not isinstance(key, str)]:
        raise PlasticError(f"the state has keys that are no names: {wrong[:5]}")
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if prefix and not own:
        return
    held_parameters(net)  # are sharded again, where FSDP2 has gathered them
    _compare_keys(net, own)
    _check_k(own["_extra_state"])
    _check_entries(net, own)
    planned = _plan_load(net, own)
    _check_unsaved(net, planned, own)
    before = [p.shape for p in net.parameters()]
    _resize_in_place(net, planned)
    adopt(net, planned)
    _share_out(net, state, prefix)
    _load_unsaved(net, state, prefix, assign)
    if assign:  # torch puts the tensors of the state in their place afterwards, see `settle`
        _prepare_assignment(net, state, prefix)
    elif before != [p.shape for p in net.parameters()]:
        net.ranks.outgrow()


def fit(net: GatedModel, state: Mapping[str, Tensor]) -> None:
    """Resize a network to the sizes in a state whose values are loaded later; the parameters stay the same objects.

    Args:
        net: The network.
        state: A state dict of the network. All but the tensors of its gates may lie on the meta device.

    Raises:
        PlasticError: The state does not fit the network. Nothing was changed.
    """
    held_parameters(net)
    _compare_keys(net, state)
    planned = _plan_load(net, state)
    before = [p.shape for p in net.parameters()]
    _resize_in_place(net, planned)
    adopt(net, planned)
    if before != [p.shape for p in net.parameters()]:
        net.ranks.outgrow()


def _share_out(net: GatedModel, state: MutableMapping[str, Any], prefix: str) -> None:
    """Shard entries of a state dict as the network's parameters are, and gather those that are whole in the network."""
    for name, t in net.named_parameters(remove_duplicate=False):
        found = state[prefix + name]
        if is_sharded(t) or is_sharded(found):
            state[prefix + name] = distributed(gathered(found).to(t.device, t.dtype), t)


def _prepare_assignment(net: GatedModel, state: MutableMapping[str, Any], prefix: str) -> None:
    """Replace entries in a state dict whose tensors a network will hold.

    Gates are brought to a precision that they can have, and the names of a shared tensor get one tensor.
    """
    for name, t in [*net.gates.named_parameters(prefix="gates"), *net.gates.named_buffers(prefix="gates")]:
        state[prefix + name] = _as_held(state[prefix + name].to(t.dtype), t)
    names = net.model.named_parameters("model", remove_duplicate=False)
    held = [*names, *net.model.named_buffers("model", remove_duplicate=False)]
    first: dict[int, Tensor] = {}
    for name, t in held:
        if prefix + name in state:
            state[prefix + name] = first.setdefault(id(t), _as_held(state[prefix + name], t))


def _as_held(found: Tensor, own: Tensor) -> Tensor:
    """Return a tensor of a state dict as a network can hold it in the place of its own: as a parameter or a buffer."""
    found = trainable(found)
    return nn.Parameter(found, own.requires_grad) if isinstance(own, nn.Parameter) else found


def _load_unsaved(net: GatedModel, state: MutableMapping[str, Any], prefix: str, assign: bool) -> None:
    """Put the buffers into a network that torch neither saves nor loads, and take them out of the state."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, buffer in net.unsaved().items():
        found = state.pop(prefix + buffer_key(name), None)
        if found is not None:
            found = trainable(found.detach())
            pairs.append((buffer, found if assign else found.to(buffer.device, buffer.dtype, copy=True)))
    if pairs:
        replace_tensors(net.model, pairs)
        net.resized = True  # or was, where the state comes from
        net.refresh()


def settle(net: GatedModel) -> None:
    """Let the gates act on the tensors that a network holds after torch has loaded it, and let DDP know of them."""
    known, now = net.gating.known, [*net.model.parameters(), *net.model.buffers()]
    others = len(known) != len(now) or any(t is not u for t, u in zip(known, now, strict=True))
    if others or (net.cost.awake == 0).nonzero()[:, 0].tolist() != net.asleep():
        net.refresh()
    if others and {id(t) for t in now if isinstance(t, nn.Parameter)} - {id(t) for t in known}:
        net.ranks.replaced()


def _compare_keys(net: GatedModel, state: Mapping[str, Any]) -> None:
    """Raise `PlasticError` unless a state dict names the same tensors as the network."""
    own, optional = net.state_dict().keys(), {buffer_key(name) for name in net.unsaved()}
    missing, extra = sorted(set(own) - set(state) - optional), sorted(set(state) - set(own))
    if missing or extra:
        found = [f"{what} {keys[:5]}" for what, keys in (("lacks", missing), ("also has", extra)) if keys]
        raise PlasticError(
            f"the state belongs to another architecture: it {' and '.join(found)}"
            f"{_cause(net, [*missing, *extra], extra)}"
        )


def _cause(net: GatedModel, keys: Sequence[str], extra: Sequence[str]) -> str:
    """Return why only the sites of a state may be others than those of the network, or an empty text.

    Args:
        net: The network.
        keys: The keys that only the state has, or only the network.
        extra: Those that only the state has.
    """
    if not all(key.startswith(("gates.", buffer_key(""))) for key in keys):
        return ""
    extra = [key for key in extra if key.startswith("gates.")]
    sites = {key.partition("/")[2].rpartition(".")[0].replace("/", ".") for key in extra}
    frozen = [module for module, reason in net.frozen.items() if reason.startswith(IDLE)]
    idle = [module for module in frozen if any(f"{site}.".startswith(f"{module}.") for site in sites)]
    if idle:
        return f". Here {', '.join(idle)} did not run: construct the network with inputs that reach it, too: {MORE}"
    return (
        ". The model is the same, and only its sites are others: construct the network with the same options, and with "
        f"example inputs that reach the same modules ({MORE})"
    )


def _check_k(k: Any) -> None:
    """Raise `PlasticError` unless this is what `PlasticNet` saves of k: one number, 0 or more."""
    if not isinstance(k, Tensor):
        raise PlasticError(_no_tensor("_extra_state (k)", k))
    if k.is_meta:
        raise PlasticError("_extra_state (k): the state has a tensor on the meta device here, which holds no number")
    if k.numel() != 1 or k.is_complex() or not float(k) >= 0:
        raise PlasticError(f"the state has k={k!r}; k is one number from 0 to infinity")


def _check_entries(net: GatedModel, state: Mapping[str, Any]) -> None:
    """Raise `PlasticError` unless the state has tensors whose numbers the tensors of the network can take.

    The shapes are compared later.
    """
    unsaved = [(buffer_key(name), t) for name, t in net.unsaved().items()]
    held = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False), *unsaved]
    logits = {id(g.phi) for g in net.all_gates()}
    first: dict[int, str] = {}
    for name, own in held:
        if name not in state:  # a buffer that is not saved, or that an earlier version did not save
            continue
        found = state[name]
        if not isinstance(found, Tensor):
            raise PlasticError(_no_tensor(name, found))
        if (_kind(found), found.layout) != (_kind(own), own.layout) or (found.is_meta and not own.is_meta):
            place = ", on the meta device" if found.is_meta else ""
            raise PlasticError(
                f"{name}: the state has {_kind(found)} numbers ({found.dtype}, {found.layout}{place}), and the network "
                f"{_kind(own)} ones ({own.dtype}, {own.layout})"
            )
        if isinstance(own, nn.Parameter) and not _finite(found) and (id(own) in logits or _finite(own)):
            raise PlasticError(
                f"{name}: the state has numbers that are NaN or infinite, as after a training that has diverged; go "
                "back to an earlier checkpoint"
            )
        other = first.setdefault(id(own), name)
        if other != name and not _equal(found, state[other]):
            raise PlasticError(f"{name} and {other} are one tensor in the network, but differ in the state")


def _no_tensor(name: str, found: Any) -> str:
    """Return what is wrong with an entry of a state that is no tensor."""
    hint = "; torch.from_numpy makes one of it" if isinstance(found, np.ndarray) else ""
    return f"{name}: the state has a {type(found).__name__} here, and the network a tensor{hint}"


def _kind(t: Tensor) -> str:
    """Return what kind of numbers a tensor holds."""
    kind = "complex" if t.is_complex() else "real" if t.is_floating_point() else "whole"
    return f"quantised {kind}" if t.is_quantized else kind


def _finite(t: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity, which is not known of one without values."""
    if t.is_meta or t.is_quantized or t.layout != torch.strided or not (t.is_floating_point() or t.is_complex()):
        return True
    t = gathered(t)
    return bool(torch.isfinite(t.float() if t.dtype.itemsize == 1 else t).all())


def _equal(t: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, as far as they have values."""
    t, other = gathered(t), gathered(other)
    return t is other or (t.shape == other.shape and (t.is_meta or torch.equal(t, other.to(t.device, t.dtype))))


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
        if any(t.dim() != 1 or len(t) == 0 or len(t) != len(found[0]) for t in found):
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
    if array[0] < 0 or array[-1] >= u.full or (np.diff(array) <= 0).any():
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
    model = net.model
    name_of = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}  # a tensor may have several
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [(f"model.{n}", name_of[id(t)], t) for n, t in held]
    gates = [(f"gates.{weight_key(n)}.phi", n, model.get_parameter(n)) for n in net.weights]
    unsaved = [(buffer_key(name), name, t) for name, t in net.unsaved().items()]
    for key, name, tensor in [*tensors, *gates, *unsaved]:
        expected = tuple(len(planned.takes.get((name, d), range(n))) for d, n in enumerate(tensor.shape))
        found = state.get(key)
        if isinstance(found, Tensor) and tuple(found.shape) != expected:
            raise PlasticError(
                f"the state belongs to another architecture: {key.removeprefix('model.')} has shape "
                f"{tuple(found.shape)}, and {expected} here"
            )


def _check_unsaved(net: GatedModel, planned: Plan, state: Mapping[str, Any]) -> None:
    """Raise `PlasticError` where a state that lacks a buffer does not say which of its entries belong to its units.

    It need not say so where no unit was cut or added, and where units are cut and all entries are equal.
    """
    for name, buffer in net.unsaved().items():
        if buffer_key(name) in state:
            continue
        lost = [(d, planned.takes.get((name, d))) for d in _unit_dims(net, name)]
        changed = net.resized or any(take is not None for _, take in lost)
        alike = all(take is None or (take >= 0).all() for _, take in lost) and not buffer.is_meta
        if changed and not (alike and all(_uniform(buffer, d) for d, _ in lost)):
            raise PlasticError(
                f"the state lacks the buffer {name}, which its module leaves out of state dicts (persistent=False), so "
                "that nothing says which of its entries belong to the units in the state. An earlier version of "
                "plasticnet wrote it; state dicts of this version hold the buffer"
            )


def _unit_dims(net: GatedModel, name: str) -> Iterator[int]:
    """Yield the dimensions of a tensor along which units lie."""
    yield from sorted({s.dim for site in net.sites.values() for s in site.units.slices if s.tensor == name})


def _uniform(t: Tensor, dim: int) -> bool:
    """Return whether all entries along a dimension are equal."""
    return bool((t == t.narrow(dim, 0, 1)).all())


def _resize_in_place(net: GatedModel, planned: Plan) -> None:
    """Apply a plan, and keep every Parameter the same object, because an optimizer may hold it."""
    sites = net.sites.values()
    logits = {s.name: (s.phi, 0.0) for s in sites}
    moved = apply_plan(net.model, planned, logits, weights={w.name: (w.phi, 0.0) for w in net.weights.values()})
    shards = Shards(net.model)
    for old, new in moved.items():
        give_parts(old, new) if is_sharded(old) else give_shape(old, new)
    replace_tensors(net.model, [(new, old) for old, new in moved.items()])
    shards.take((new, old) for old, new in moved.items())
    for site in sites:
        if site.name in planned.sources:
            site.grace = rewrite(site.grace, {0: planned.sources[site.name]})
