"""Reads and writes the files of this library: safetensors with a recipe, plain data in JSON, beside the tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from plasticnet.errors import PlasticError

_KEY = "plasticnet"
FORMAT = 1


def write_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], recipe: dict[str, Any]) -> None:
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


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT or recipe.get("kind") != kind:
        found = (recipe.get("kind"), recipe.get("format")) if isinstance(recipe, dict) else "none"
        raise PlasticError(f"{path} holds {found}; expected ({kind!r}, {FORMAT})")
    return tensors, recipe


def mapping_in(path: Any, recipe: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = recipe.get(key)
    if not isinstance(value, dict):
        raise PlasticError(f"{path}: damaged (its recipe has no {key})")
    return value
