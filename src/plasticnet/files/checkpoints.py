"""Saves and loads checkpoints: nested dicts and lists of tensors, numbers and strings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.files.container import FORMAT, read_file, write_file

_DEPTH = 64  # of nested dicts and lists; state dicts have about five


def save_checkpoint(tree: Any, path: str | os.PathLike[str]) -> None:
    """Write nested dicts and lists of tensors, numbers and strings (state dicts, say).

    Raises `PlasticError` for anything else.
    """
    tensors: dict[str, Tensor] = {}
    write_file(path, tensors, {"format": FORMAT, "kind": "checkpoint", "tree": _encode(tree, tensors)})


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What `save_checkpoint` wrote. Raises `PlasticError` when the file is not one or is damaged."""
    tensors, recipe = read_file(path, "checkpoint")
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
