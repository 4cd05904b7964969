"""Integers on modules that repeat a width, and must follow when it changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from plasticnet.layers.attention import free_heads, head_size
from plasticnet.tools.feature_info import feature_widths, with_feature_widths
from plasticnet.tools.torch_private import BatchOrInstanceNorm, Conv, ConvTranspose, buffers_of, parameters_of
from plasticnet.units import Units, Width, owner

# These attributes of torch's own layers follow the shapes of their parameters.
WIDTHS = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_channels",
    "num_groups",
    "num_parameters",
    "embedding_dim",
    "normalized_shape",
    "input_size",
    "hidden_size",
    "proj_size",
    "d_model",
    "unflattened_size",
)

_NORM_WIDTHS = ("num_features", "num_channels")


def weights_of(model: nn.Module, tensors: Iterable[str]) -> dict[str, str]:
    """Return the name of the weight of every module that holds some of these tensors, where it has one.

    Modules may share a tensor, which has the name that it has in the first of them.

    Args:
        model: The model, before any of the tensors is resized.
        tensors: The names of parameters and buffers.
    """
    held = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    resized = {id(held[t]) for t in tensors if t in held}
    owners = dict.fromkeys(owner(name) for name, t in held.items() if id(t) in resized)
    found = {name: _weight(model.get_submodule(name)) for name in owners}
    return {name: weight for name, weight in found.items() if weight is not None}


def update_attributes(
    model: nn.Module,
    takes: Mapping[tuple[str, int], np.ndarray],
    groups: Mapping[str, int],
    weights: Mapping[str, str],
) -> None:
    """Bring the attributes of modules up to date with parameters that were resized.

    Args:
        model: The model.
        takes: The dimensions that were resized, as the keys (tensor, dim) of `Plan.takes`.
        groups: For the weights of grouped layers, the number of rows in one group. The weight alone does not show it,
            since a grouped convolution with a single group looks like an ordinary one.
        weights: What `weights_of` returned for the tensors that were resized.
    """
    for tensor, rows in groups.items():
        module = model.get_submodule(owner(tensor))
        if isinstance(module, Conv):
            module.groups = model.get_parameter(tensor).shape[0] // rows
        elif isinstance(module, nn.GroupNorm):
            module.num_groups = model.get_parameter(tensor).shape[0] // rows
    for name in dict.fromkeys([*(owner(tensor) for tensor, _ in takes), *weights]):
        module = model.get_submodule(name)
        for attribute, value in _expected(module, weights.get(name)):
            old = getattr(module, attribute, None)
            if type(old) is type(value) and old != value:
                setattr(module, attribute, value)
        for attention in (module, model.get_submodule(name.rpartition(".")[0])):
            size = head_size(attention)
            if size is not None:
                free_heads(attention, size)


def shift_widths(model: nn.Module, shifts: Iterable[tuple[Width, int]]) -> None:
    """Let attributes follow changes in the number of units.

    Args:
        model: The model.
        shifts: Pairs of an attribute and the number of units that its site has gained, negative where it has lost some.
    """
    for width, units in shifts:
        module = model.get_submodule(width.module)
        value = getattr(module, width.attribute)
        if width.place is None:
            value = value + units * width.per_unit
        else:
            features = feature_widths(value)
            own = value if features is None else features
            changed = [v + units * width.per_unit if i == width.place else v for i, v in enumerate(own)]
            value = type(value)(changed) if features is None else with_feature_widths(value, changed)
        setattr(module, width.attribute, value)


def candidates(model: nn.Module, units: Units, outside: bool = False) -> list[Width]:
    """Return the attributes that may follow the size of a site, judging by their values.

    A value qualifies if it is the number of units, a multiple of it, or the length of a dimension along which the site
    lies. The attributes are sought in the modules that own slices of the site, in the modules that contain these, up to
    the one that contains all of them and is no list, and in direct submodules of any of these that have no parameters.

    Args:
        model: The model.
        units: The site.
        outside: Whether to search also the modules that contain the one that contains all.

    Returns:
        The attributes, with the smallest number per unit first.
    """
    paths = [list(filter(None, owner(s.tensor).split("."))) for s in units.slices]
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths)))
    common = 0 if outside else shared
    while common and isinstance(model.get_submodule(".".join(paths[0][:common])), nn.ModuleList | nn.ModuleDict):
        common -= 1  # a list has no attributes of its own
    names = dict.fromkeys(".".join(path[:n]) for path in paths for n in range(common, len(path) + 1))
    for name in list(names):  # A layer without parameters beside them may have a width too, as nn.Unflatten has.
        for leaf, child in model.get_submodule(name).named_children():
            if next(child.parameters(), None) is None:
                names.setdefault(f"{name}.{leaf}".lstrip("."))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    widths = {tensors[s.tensor].shape[s.dim]: s.index.shape[1] for s in units.slices if s.tensor in tensors}
    found: list[Width] = []
    for name in names:
        module = model.get_submodule(name)
        known = {attribute for attribute, _ in _expected(module, _weight(module))}
        if isinstance(module, BatchOrInstanceNorm | nn.GroupNorm):
            known |= set(_NORM_WIDTHS)  # tracing has seen which channels it counts
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or attribute in known:
                continue
            places = [(None, value)] if type(value) is int else []
            if isinstance(value, list | tuple) and type(value) in (list, tuple):
                places = [(i, v) for i, v in enumerate(value) if type(v) is int]
            for place, v in places:
                per_unit = widths.get(v) or (v // units.size if v and v % units.size == 0 else 0)
                if per_unit and any(w % per_unit == 0 for w in widths.values()):
                    found.append(Width(name, attribute, per_unit, place))
    return sorted(found, key=lambda w: w.per_unit)  # A number of units is the likeliest.


def _weight(module: nn.Module) -> str | None:
    """Return the name of the tensor whose shape says how wide a layer of torch is, or None where there is none.

    A layer reads it by a name of its own. Where no parameter or buffer of this name has the right number of dimensions,
    the weight is computed, as by weight_norm, or has another name. It is then told from the other tensors by its shape,
    which is the one that the attributes of the layer say.
    """
    kind = next((c for c in _READS if isinstance(module, c)), None)
    if kind is None:
        return None
    names, declared = _READS[kind]
    try:
        shape = declared(module)
    except (AttributeError, TypeError, ZeroDivisionError):  # A subclass may have other attributes.
        return None
    own = {n: t for n, t in (*parameters_of(module).items(), *buffers_of(module).items()) if t is not None}
    for name in names:
        found = tuple(own[name].shape) if name in own else ()
        turned = found != shape and sorted(found) == sorted(shape)  # A subclass may keep its weight transposed.
        if len(found) == len(shape) and not turned:
            return name
    if hasattr(module, "parametrizations"):
        own.update((n, t) for n, t in module.named_parameters() if n.startswith("parametrizations."))
    alike = [n for n, t in own.items() if tuple(t.shape) == shape]
    # Of several, one that is named after the weight. Lengths and directions of a weight_norm have one shape where the
    # layer reads a single channel; the directions come last, and are the ones that say how many it reads.
    return max(reversed(alike), key=lambda n: names[0] in n, default=None)


def _conv_shape(module: Any) -> tuple[int, ...]:
    """Return the shape of the weight that the attributes of a convolution say."""
    first, second = module.out_channels, module.in_channels
    if isinstance(module, ConvTranspose):
        first, second = second, first
    return (first, second // module.groups, *module.kernel_size)


def _gates(module: Any) -> int:
    """Return how many gates a recurrent layer has, which are rows of the same weight."""
    mode = getattr(module, "mode", type(module).__name__)
    return {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}.get(mode, 1)


# For each class, the names that it reads its weight by, and the shape of the weight that its attributes say.
_READS: dict[type[nn.Module], tuple[tuple[str, ...], Callable[[Any], tuple[int, ...]]]] = {
    nn.Linear: (("weight",), lambda m: (m.out_features, m.in_features)),
    nn.Bilinear: (("weight",), lambda m: (m.out_features, m.in1_features, m.in2_features)),
    Conv: (("weight",), _conv_shape),
    BatchOrInstanceNorm: (("weight", "bias", "running_mean", "running_var"), lambda m: (m.num_features,)),
    nn.GroupNorm: (("weight", "bias"), lambda m: (m.num_channels,)),
    nn.LayerNorm: (("weight", "bias"), lambda m: tuple(m.normalized_shape)),
    nn.RMSNorm: (("weight",), lambda m: tuple(m.normalized_shape)),
    nn.RNNBase: (("weight_ih_l0",), lambda m: (_gates(m) * m.hidden_size, m.input_size)),
    nn.RNNCellBase: (("weight_ih",), lambda m: (_gates(m) * m.hidden_size, m.input_size)),
    nn.PReLU: (("weight",), lambda m: (m.num_parameters,)),
    nn.Embedding: (("weight",), lambda m: (m.num_embeddings, m.embedding_dim)),
}


def _shape_of(module: nn.Module, tensor: str) -> torch.Size:
    """Return the shape of a parameter or a buffer of a module, by its name within the module."""
    owned, _, leaf = tensor.rpartition(".")
    holder = module.get_submodule(owned)
    held = parameters_of(holder).get(leaf)
    held = buffers_of(holder)[leaf] if held is None else held
    assert held is not None
    return held.shape


def _expected(module: nn.Module, weight: str | None) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """Yield what the widths of a module should be, judging by its weight, as pairs of name and value.

    Args:
        module: The module.
        weight: The name of its weight, as `_weight` returns it.
    """
    if weight is None:
        return
    shape = _shape_of(module, weight)
    if isinstance(module, nn.Linear):
        yield from (("out_features", shape[0]), ("in_features", shape[1]))
    elif isinstance(module, nn.Bilinear):
        yield "out_features", shape[0]
    elif isinstance(module, Conv):
        other = shape[1] * module.groups
        first, second = (
            ("in_channels", "out_channels") if isinstance(module, ConvTranspose) else ("out_channels", "in_channels")
        )
        yield from ((first, shape[0]), (second, other))
    elif isinstance(module, BatchOrInstanceNorm):
        yield "num_features", shape[0]
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        yield "normalized_shape", tuple(shape)
    elif isinstance(module, nn.RNNBase):
        yield from (("input_size", shape[1]), ("hidden_size", shape[0] // _gates(module)))
        if module.proj_size:
            yield "proj_size", _shape_of(module, "weight_hr_l0")[0]
    elif isinstance(module, nn.RNNCellBase):
        yield from (("input_size", shape[1]), ("hidden_size", module.weight_hh.shape[1]))
    elif isinstance(module, nn.PReLU):
        yield "num_parameters", shape[0]
    elif isinstance(module, nn.Embedding):
        yield "embedding_dim", shape[1]


def group_size(module: nn.Module) -> int | None:
    """Return the number of channels in one group, which no resize changes, or None where there are no groups."""
    if isinstance(module, Conv) and module.groups > 1:
        return (module.in_channels if isinstance(module, ConvTranspose) else module.out_channels) // module.groups
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups if module.num_groups > 1 else None
    return None


def mismatches(module: nn.Module, group: int | None, weight: str | None, unread: Collection[str] = ()) -> Iterator[str]:
    """Yield descriptions of where a module's attributes contradict the shapes of its parameters.

    Args:
        module: The module.
        group: The `group_size` that it must have, or None.
        weight: The name of its weight, as `weights_of` has found it before the sizes changed, or None.
        unread: The names of vectors of the module that keep their length, because nothing reads them.
    """
    expected = dict(_expected(module, weight))
    outputs = next((v for n, v in expected.items() if n in ("out_features", "out_channels", *_NORM_WIDTHS)), None)
    for leaf in ("bias", "running_mean", "running_var"):
        held = {**parameters_of(module), **buffers_of(module)}
        # torch.nn.utils.prune computes the bias from the other two, at the next call only
        for name in (leaf, f"{leaf}_orig", f"{leaf}_mask"):
            vector = held.get(name)
            if outputs is not None and vector is not None and vector.shape != (outputs,) and name not in unread:
                yield f"{name} has shape {tuple(vector.shape)}, for {outputs} outputs"
    if isinstance(module, Conv) and weight == "weight":
        groups = module.weight.shape[0] // group if group else 1
        if module.groups != groups:
            yield f"groups is {module.groups}, but its parameters say {groups}"
    if isinstance(module, nn.GroupNorm) and group and module.num_groups * group != module.num_channels:
        yield f"num_groups is {module.num_groups}, but groups have {group} of {module.num_channels} channels"
    for name, value in expected.items():
        if getattr(module, name, value) != value:
            yield f"{name} is {getattr(module, name)}, but its parameters say {value}"
    if isinstance(module, Conv) and weight == "weight" and tuple(module.weight.shape[2:]) != tuple(module.kernel_size):
        yield f"the kernel is {tuple(module.kernel_size)}, but weight has shape {tuple(module.weight.shape)}"
