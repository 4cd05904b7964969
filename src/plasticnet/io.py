"""Files: a compact module as safetensors with a shape recipe; a checkpoint as safetensors with a tree.

No pickle: a file can hold tensors, and JSON that is checked before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from plasticnet.attention import free_heads, head_size, unfuse_encoders
from plasticnet.attributes import WIDTHS, group_size, mismatches
from plasticnet.compact import RECORD, Take, insert_take, remove_block
from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.resize import replace_tensors
from plasticnet.sparse import sparse_layers

_KEY = "plasticnet"
_FORMAT = 1
_DEPTH = 64  # of nested dicts and lists; state dicts have about five


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
    recipe = {"format": _FORMAT, "kind": "module", "attributes": attributes, "takes": takes}
    recipe.update((key, record[key]) for key in ("resized", "removed") if key in record)
    _write(path, {n: t.detach().cpu().contiguous().clone() for n, t in _tensors(module).items()}, recipe)


def load(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """The module in a file that `save` wrote, in evaluation mode. ``factory`` builds the original
    architecture, in any width.

    Raises `PlasticError` when the file is not one of ours, is damaged, or belongs to another
    architecture (naming the tensor and the shapes).
    """
    tensors, recipe = _read(path, "module")
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
    takes = _mapping(path, recipe, "takes")
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
    for name, widths in _mapping(path, recipe, "attributes").items():
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
    derived = {
        f"{prefix}.{leaf}".lstrip(".") for prefix, m in model.named_modules() for leaf in m._non_persistent_buffers_set
    }
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


# -- checkpoints ------------------------------------------------------------------------------


def save_checkpoint(tree: Any, path: str | os.PathLike[str]) -> None:
    """Write nested dicts and lists of tensors, numbers and strings (state dicts, say).

    Raises `PlasticError` for anything else.
    """
    tensors: dict[str, Tensor] = {}
    _write(path, tensors, {"format": _FORMAT, "kind": "checkpoint", "tree": _encode(tree, tensors)})


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What `save_checkpoint` wrote. Raises `PlasticError` when the file is not one or is damaged."""
    tensors, recipe = _read(path, "checkpoint")
    try:
        return _decode(recipe["tree"], tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PlasticError(f"{path}: damaged ({error!r})") from error


def _encode(tree: Any, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    if depth > _DEPTH:
        raise PlasticError(f"a checkpoint cannot be nested more than {_DEPTH} deep")
    if isinstance(tree, Tensor):
        key = f"{len(tensors):06d}"
        tensors[key] = tree.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(tree, Mapping):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors, depth + 1)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list" if isinstance(tree, list) else "tuple": [_encode(v, tensors, depth + 1) for v in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise PlasticError(f"a checkpoint cannot hold a {type(tree).__name__}")


def _decode(data: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    if not isinstance(data, dict):
        return data
    if depth > _DEPTH:
        raise ValueError(f"nested more than {_DEPTH} deep")
    ((kind, value),) = data.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {_decode(k, tensors, depth + 1): _decode(v, tensors, depth + 1) for k, v in value}
    if kind not in ("list", "tuple"):
        raise ValueError(kind)
    items = [_decode(v, tensors, depth + 1) for v in value]
    return items if kind == "list" else tuple(items)


# -- safetensors ------------------------------------------------------------------------------


def _write(path: str | os.PathLike[str], tensors: dict[str, Tensor], recipe: dict[str, Any]) -> None:
    """One metadata key, so that equal content gives equal bytes; replaced atomically. safetensors has
    no complex128: such tensors are written as pairs."""
    pairs = sorted(n for n, t in tensors.items() if t.dtype == torch.complex128)
    if pairs:
        tensors = {n: torch.view_as_real(t).contiguous() if n in pairs else t for n, t in tensors.items()}
        recipe = {**recipe, "complex": pairs}
    data = serialise(tensors, {_KEY: json.dumps(recipe, sort_keys=True)})
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PlasticError(f"{path} cannot be written: {error}") from error


def _read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if _KEY not in metadata:
                raise PlasticError(f"{path} is a safetensors file, but not one that plasticnet wrote")
            recipe = json.loads(metadata[_KEY])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            for name in recipe.get("complex", []) if isinstance(recipe, dict) else []:
                tensors[name] = torch.view_as_complex(tensors[name])
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        raise PlasticError(f"{path} is not a plasticnet file, or is damaged or truncated: {error}") from error
    except OSError as error:
        raise PlasticError(f"{path} cannot be read: {error}") from error
    if not isinstance(recipe, dict) or recipe.get("format") != _FORMAT or recipe.get("kind") != kind:
        found = (recipe.get("kind"), recipe.get("format")) if isinstance(recipe, dict) else "none"
        raise PlasticError(f"{path} holds {found}; expected ({kind!r}, {_FORMAT})")
    return tensors, recipe


def _mapping(path: Any, recipe: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = recipe.get(key)
    if not isinstance(value, dict):
        raise PlasticError(f"{path}: damaged (its recipe has no {key})")
    return value
