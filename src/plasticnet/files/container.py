"""Reads and writes the files of this library: safetensors files that hold a recipe, in JSON, beside the tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from plasticnet.errors import PlasticError

_KEY = "plasticnet"  # the metadata key of the recipe
FORMAT = 1  # the version of the file format
PARTIAL = ".partial"  # what is added to the name of a file while it is written


def write_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], recipe: dict[str, Any]) -> None:
    """Write tensors and a recipe into a file, which appears whole or not at all.

    There is a single metadata key, so that equal content gives equal bytes. The format has no complex128, so such
    tensors are written as pairs of real numbers.

    Args:
        path: The file, which is replaced if it exists.
        tensors: The tensors by name. They are on the CPU, contiguous, and share no memory.
        recipe: Plain data. It has the keys "format" and "kind", which `read_file` checks.

    Raises:
        PlasticError: The file cannot be written.
    """
    pairs = sorted(n for n, t in tensors.items() if t.dtype == torch.complex128)
    if pairs:
        tensors = {n: torch.view_as_real(t).contiguous() if n in pairs else t for n, t in tensors.items()}
        recipe = {**recipe, "complex": pairs}
    replace_file(path, serialise(tensors, {_KEY: json.dumps(recipe, sort_keys=True)}))


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, which appears whole or not at all.

    Args:
        path: The file, which is replaced if it exists.
        data: Its content.

    Raises:
        PlasticError: The file cannot be written. What it held before is still there.
    """
    target = Path(path)
    partial = target.with_name(target.name + PARTIAL)
    try:
        partial.write_bytes(data)
        os.replace(partial, target)
    except BaseException as error:
        with suppress(OSError):  # the file, or even its folder, may not exist
            partial.unlink()
        if isinstance(error, OSError):
            raise PlasticError(f"{path} cannot be written: {error}") from error
        raise  # an interruption by the user


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the recipe in a file that `write_file` wrote.

    Args:
        path: The file.
        kind: What the recipe must have under "kind".

    Raises:
        PlasticError: The file cannot be read, is damaged, is not one of ours, or is of another kind or format.
    """
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
        raise PlasticError(f"{path} is not a plasticnet file, or is damaged or cut off") from error
    except OSError as error:
        raise PlasticError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT or recipe.get("kind") != kind:
        found = f"{recipe.get('kind')!r} of format {recipe.get('format')}" if isinstance(recipe, dict) else "no recipe"
        raise PlasticError(f"{path} holds {found}; expected {kind!r} of format {FORMAT}")
    return tensors, recipe


def mapping_in(path: Any, recipe: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the dict under a key of a recipe. Raises `PlasticError` where there is none."""
    value = recipe.get(key)
    if not isinstance(value, dict):
        raise PlasticError(f"{path}: damaged (its recipe has no {key})")
    return value
