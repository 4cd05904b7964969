"""Files: a compact module as safetensors with a shape recipe; a checkpoint as safetensors with a tree.

No pickle: a file can hold tensors, and JSON that is checked before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.files.container import FORMAT, mapping_in, read_file, write_file
from plasticnet.layers.attention import free_heads, head_size, unfuse_encoders
from plasticnet.layers.record import RECORD
from plasticnet.layers.skip import remove_block
from plasticnet.layers.sparse import sparse_layers
from plasticnet.layers.take import Take, insert_take
from plasticnet.net import PlasticNet
from plasticnet.surgery.attributes import WIDTHS, group_size, mismatches
from plasticnet.surgery.rewrite import replace_tensors
from plasticnet.tools.torch_private import unsaved_buffers


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a compacted (or any plain) module: its tensors, and what a factory of the original
    architecture needs to take its shape. Equal modules give equal bytes; the file appears whole or
    not at all."""
    if any(isinstance(child, PlasticNet) for child in module.modules()):
        raise PlasticError("save takes a plain module: net.compact(); to go on training, use save_checkpoint")
    if sparse := sparse_layers(module):
        raise PlasticError(f"{sparse[0]!r} is sparse; save what was given to sparsify, and sparsify what load gives")
    record: dict[str, Any] = getattr(module, RECORD, {})
    attributes: dict[str, dict[str, Any]] = {}
    takes: dict[str, int] = {}
    for name, child in module.named_modules():
        if isinstance(child, Take):
            takes[name.rpartition(".")[0]] = child.axis
        own = [a for a in WIDTHS if a in child.__dict__] + [a for m, a in record.get("widths", []) if m == name]
        widths = {a: _plain(child.__dict__[a]) for a in own if _is_width(child.__dict__[a])}
        if widths:
            attributes[name] = widths
    recipe = {"format": FORMAT, "kind": "module", "attributes": attributes, "takes": takes}
    recipe.update((key, record[key]) for key in ("resized", "removed") if key in record)
    write_file(path, {n: t.detach().cpu().contiguous().clone() for n, t in _tensors(module).items()}, recipe)


def load(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """The module in a file that `save` wrote, in evaluation mode. ``factory`` builds the original
    architecture, in any width.

    Raises `PlasticError` when the file is not one of ours, is damaged, or belongs to another
    architecture (naming the tensor and the shapes).
    """
    tensors, recipe = read_file(path, "module")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise PlasticError(f"load takes a factory, such as {type(factory).__name__} itself, not what it returns")
    model = factory()
    if not isinstance(model, nn.Module):
        raise PlasticError(f"the factory returned a {type(model).__name__}, not an nn.Module")
    model.eval()  # first: in training mode spectral_norm changes its state when its weight is read
    removed = recipe.get("removed", [])
    for name in removed if isinstance(removed, list) else [None]:
        if not isinstance(name, str) or not name:
            raise PlasticError(f"{path}: damaged (which blocks were removed)")
        _submodule(path, model, name)
        remove_block(model, name)
    takes = mapping_in(path, recipe, "takes")
    for name, axis in takes.items():
        indices = tensors.get(f"{name}.0.indices")
        sound = (
            indices is not None and indices.dim() == 1 and indices.dtype == torch.int64 and bool((indices >= 0).all())
        )
        if type(axis) is not int or not -8 <= axis < 0 or indices is None or not sound:
            raise PlasticError(f"{path}: damaged (the features taken before {name!r})")
        _submodule(path, model, name)
        insert_take(model, name, Take(indices, axis))
    groups = {name: group_size(module) for name, module in model.named_modules()}
    heads = {name: size for name, module in model.named_modules() if (size := head_size(module)) is not None}
    for name, widths in mapping_in(path, recipe, "attributes").items():
        _set_widths(path, _submodule(path, model, name), name, widths)
    resized = recipe.get("resized")
    if resized is not None:
        if not isinstance(resized, list) or not all(isinstance(pair, list) for pair in resized):
            raise PlasticError(f"{path}: damaged (which dimensions were resized)")
        widths = [[name, a] for name, own in recipe["attributes"].items() for a in own if a not in WIDTHS]
        setattr(model, RECORD, {"resized": resized, "widths": widths, "removed": removed})
    _set_tensors(path, model, tensors, resized)
    for name, size in heads.items():
        free_heads(model.get_submodule(name), size)
    unfuse_encoders(model)
    for name, module in model.named_modules():
        for what in mismatches(module, groups.get(name)):
            raise PlasticError(f"{path} belongs to another architecture, or is damaged: {name}: {what}")
    for name in takes:
        take, layer = model.get_submodule(f"{name}.0"), model.get_submodule(f"{name}.1")
        width = getattr(layer, "in_features", getattr(layer, "in_channels", None))
        if isinstance(take, Take) and width not in (None, len(take.indices)):
            raise PlasticError(
                f"{path}: damaged ({len(take.indices)} features are taken before {name!r}, {width} are read)"
            )
    return model


def _is_width(value: Any) -> bool:
    """Whether an attribute may be set from a file: a whole number, or a tuple or list of them."""
    values = value if type(value) in (tuple, list) else [value]
    return bool(values) and all(type(v) is int and v >= 1 for v in values)


def _length(value: Any) -> int:
    return 1 if isinstance(value, int) else len(value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else list(value)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _submodule(path: Any, model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlasticError(f"{path} belongs to another architecture: {type(model).__name__} has no {name!r}") from None


def _set_widths(path: Any, module: nn.Module, name: str, widths: Any) -> None:
    if not isinstance(widths, dict):
        raise PlasticError(f"{path}: damaged (the widths of {name!r})")
    for attribute, value in widths.items():
        old = module.__dict__.get(attribute)
        # Of torch's own layers only the widths: their strides, say, are no business of a file's.
        allowed = attribute in WIDTHS or not (attribute.startswith("_") or type(module).__module__.startswith("torch."))
        fits = allowed and _is_width(old) and _is_width(value)
        if not fits or isinstance(old, int) != isinstance(value, int) or _length(old) != _length(value):
            raise PlasticError(f"{path}: may not set {name}.{attribute} from {old!r} to {value!r}")
        setattr(module, attribute, value if isinstance(old, int) else tuple(value) if isinstance(old, tuple) else value)


def _set_tensors(path: Any, model: nn.Module, tensors: Mapping[str, Tensor], resized: Any) -> None:
    """Replace every tensor; only dimensions in ``resized`` (any, if None) may differ from the model's."""
    own = _tensors(model)
    extra, missing = sorted(tensors.keys() - own.keys())[:5], sorted(own.keys() - tensors.keys())[:5]
    if extra or missing:
        raise PlasticError(
            f"{path} belongs to another architecture than {type(model).__name__}: "
            f"only the file has {extra}, only the model {missing}"
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    derived = {f"{prefix}.{leaf}".lstrip(".") for prefix, m in model.named_modules() for leaf in unsaved_buffers(m)}
    for name, old in own.items():
        new = tensors[name].to(old.device)
        if new.dtype.is_floating_point != old.dtype.is_floating_point or new.dtype.is_complex != old.dtype.is_complex:
            raise PlasticError(f"{path}: {name} is {new.dtype} in the file, {old.dtype} in {type(model).__name__}")
        # What is no part of the state dict says nothing about the architecture: a model may compute it as it runs.
        free = None if name in derived else resized
        fixed = [d for d in range(old.dim()) if free is not None and [name, d] not in free]
        if new.dim() != old.dim() or any(new.shape[d] != old.shape[d] for d in fixed):
            raise PlasticError(
                f"{path} belongs to another architecture: {name} has shape {tuple(new.shape)} in the file, "
                f"{tuple(old.shape)} in {type(model).__name__}"
            )
        pairs.append((old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new))
    replace_tensors(model, pairs)
