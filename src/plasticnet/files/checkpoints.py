"""Saves and loads checkpoints: nested dicts and lists of tensors, numbers and strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.files.container import FORMAT, read_file, stored, write_file
from plasticnet.files.disk import AnyPath
from plasticnet.tools.sharding import is_sharded

_DEPTH = 64  # the most levels of nested dicts and lists; state dicts have about five


def save_checkpoint(tree: Any, path: AnyPath) -> None:
    """Write a checkpoint: nested dicts, lists and tuples of tensors, numbers, strings and None.

    State dicts are such nests. A file holds no pickle, and it appears whole or not at all.

    Args:
        tree: What to write. The tensors may lie on any device.
        path: The file, which is replaced if it exists.

    Raises:
        PlasticError: ``tree`` holds something else or is nested too deeply, or the file cannot be written.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> model = torch.nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn.save_checkpoint({"epoch": 3, "model": model.state_dict()}, f"{folder}/last.safetensors")
        ...     saved = pn.load_checkpoint(f"{folder}/last.safetensors")
        >>> saved["epoch"], list(saved["model"])
        (3, ['weight', 'bias'])
    """
    tensors: dict[str, Tensor] = {}
    write_file(path, tensors, {"format": FORMAT, "kind": "checkpoint", "tree": encode(tree, tensors)})


def load_checkpoint(path: AnyPath) -> Any:
    """Read a checkpoint that `save_checkpoint` wrote.

    Nothing in the file is run, so that a file from elsewhere can be read safely.

    Args:
        path: The file.

    Returns:
        What was given to `save_checkpoint`, with all tensors on the CPU.

    Raises:
        PlasticError: The file cannot be read, is damaged, or is no checkpoint.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn.save_checkpoint([torch.arange(3), {"best": 0.5}, None], f"{folder}/some.safetensors")
        ...     pn.load_checkpoint(f"{folder}/some.safetensors")
        [tensor([0, 1, 2]), {'best': 0.5}, None]
    """
    tensors, recipe = read_file(path, "checkpoint")
    try:
        return decode(recipe["tree"], tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PlasticError(f"{path}: damaged ({error!r})") from error


def encode(tree: Any, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return a tree as JSON data, in which every tensor is replaced by its key in ``tensors``, where it is added.

    A container becomes a dict with one key, which says of what type it is.
    """
    if depth > _DEPTH:
        raise PlasticError(f"a checkpoint cannot be nested more than {_DEPTH} deep")
    if is_sharded(tree):
        raise PlasticError(
            "a tensor of the checkpoint is a DTensor (FSDP2), of which every process holds a part: write it by "
            "save_distributed, or save the plain module that net.compact() returns"
        )
    if isinstance(tree, Tensor):
        key = f"{len(tensors):06d}"
        tensors[key] = stored(tree, f"a tensor of the checkpoint, of shape {_shape(tree)},")
        return {"tensor": key}
    if isinstance(tree, Mapping):
        return {"dict": [[encode(k, tensors), encode(v, tensors, depth + 1)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list" if isinstance(tree, list) else "tuple": [encode(v, tensors, depth + 1) for v in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise PlasticError(f"a checkpoint cannot hold a {type(tree).__name__}")


def _shape(t: Tensor) -> str:
    """Return the shape of a tensor for a message; a nested one has none."""
    return "?" if t.is_nested else str(tuple(t.shape))


def decode(data: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """Return the tree that `encode` was given. Raises `KeyError`, `TypeError` or `ValueError` for other data."""
    if not isinstance(data, dict):
        return data
    if depth > _DEPTH:
        raise ValueError(f"nested more than {_DEPTH} deep")
    ((kind, value),) = data.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {decode(k, tensors, depth + 1): decode(v, tensors, depth + 1) for k, v in value}
    if kind not in ("list", "tuple"):
        raise ValueError(kind)
    items = [decode(v, tensors, depth + 1) for v in value]
    return items if kind == "list" else tuple(items)
