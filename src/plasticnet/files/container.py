"""Reads and writes the files of this library: safetensors files that hold a recipe, in JSON, beside the tensors.

The recipe begins with a checksum of the whole file, in which the checksum itself counts as zeros. It tells damage, and
nothing else: who changes a file on purpose can compute it anew. Files of format 1 have none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.files.disk import AnyPath, open_file, path_of, replace_file
from plasticnet.tools.torch_private import made_of_tensors

_KEY = "plasticnet"  # the metadata key of the recipe
FORMAT = 2  # the version of the file format
_READABLE = (1, FORMAT)  # without a checksum, and with one
_HEADER = 64 * 2**20  # the most bytes of a header, so that a small file cannot ask for much memory
_CHUNK = 2**20
# After eight bytes with its length, a header of ours begins like this, and from format 2 on the checksum comes next.
BEGINNING = f'{{"__metadata__":{{"{_KEY}":'.encode()
_SEALED = BEGINNING + rb'"{\"checksum\": \"'
_UNKNOWN = "0" * 64  # a checksum, before it is known


def write_file(path: AnyPath, tensors: dict[str, Tensor], recipe: dict[str, Any]) -> None:
    """Write tensors and a recipe into a file, which appears whole or not at all.

    There is a single metadata key, so that equal content gives equal bytes. The format has no complex128, so such
    tensors are written as pairs of real numbers.

    Args:
        path: The file, which is replaced if it exists.
        tensors: The tensors by name. They are on the CPU, contiguous, and share no memory.
        recipe: Plain data. It has the keys "format" and "kind", which `read_file` checks.

    Raises:
        PlasticError: The file cannot be written, or its recipe is too long to be read again.
    """
    path = path_of(path)
    pairs = sorted(n for n, t in tensors.items() if t.dtype == torch.complex128)
    if pairs:
        tensors = {n: torch.view_as_real(t).contiguous() if n in pairs else t for n, t in tensors.items()}
        recipe = {**recipe, "complex": pairs}
    try:
        text = f'{{"checksum": "{_UNKNOWN}", {json.dumps(recipe, sort_keys=True)[1:]}'
    except ValueError as error:
        most = sys.get_int_max_str_digits()
        raise PlasticError(
            f"{path} cannot be written: a whole number has more than {most:,} digits, which Python would not read again"
        ) from error
    try:
        data = bytearray(serialise(tensors, {_KEY: text}))
    except KeyError as error:
        raise PlasticError(
            f"{path} cannot be written: safetensors has no {error.args[0]}; convert the tensor before"
        ) from error
    if int.from_bytes(data[:8], "little") > _HEADER:
        raise PlasticError(
            f"{path} cannot be written: all but its tensors takes more than {_HEADER:,} bytes: make tensors of long "
            "lists of numbers"
        )
    begin = 8 + len(_SEALED)
    data[begin : begin + len(_UNKNOWN)] = sha256(data).hexdigest().encode()
    replace_file(path, data)


def stored(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor as a file holds it: on the CPU, contiguous, and with a memory of its own.

    Args:
        tensor: The tensor.
        name: What it is called in messages.

    Raises:
        PlasticError: It has no values, or they do not lie one after the other, as in a sparse tensor.
    """
    if tensor.is_meta:
        raise PlasticError(f"{name} lies on the meta device and has no values to write; load or compute them before")
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided or made_of_tensors(tensor):
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else "packed"
        kind = "sparse" if "sparse" in str(tensor.layout) else kind
        raise PlasticError(
            f"{name} is {kind} ({type(tensor).__name__}, {str(tensor.layout).removeprefix('torch.')}), and files hold "
            "plain tensors: make it one before, as by to_dense(), dequantize() or unbind(), or leave it out"
        )
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()


def read_file(path: AnyPath, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the recipe in a file that `write_file` wrote.

    Args:
        path: The file.
        kind: What the recipe must have under "kind".

    Raises:
        PlasticError: The file cannot be read, is damaged, is not one of ours, or is of another kind or format.
    """
    path = path_of(path)
    sealed = _check(path)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise PlasticError(f"{path} cannot be read: its name is not UTF-8: rename it") from error
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
    version = recipe.get("format") if isinstance(recipe, dict) else None
    if type(version) is not int or version not in _READABLE or recipe.get("kind") != kind:
        found = f"{recipe.get('kind')!r} of format {version}" if isinstance(recipe, dict) else "no recipe"
        raise PlasticError(f"{path} holds {found}; expected {kind!r} of format {FORMAT}")
    if version > 1 and not sealed:
        raise PlasticError(f"{path} is damaged: it has lost its checksum; take a copy of it, or write it anew")
    return tensors, recipe


def _check(path: AnyPath) -> bool:
    """Return whether a file has a checksum. Raises `PlasticError` where it has one of another content."""
    with open_file(path) as file:
        try:
            head = file.read(8 + len(_SEALED) + len(_UNKNOWN))
            if int.from_bytes(head[:8], "little") > _HEADER:
                raise PlasticError(f"{path} is not a plasticnet file, or is damaged or cut off")
            if head[8 : 8 + len(_SEALED)] != _SEALED:
                return False
            found, digest = head[8 + len(_SEALED) :], sha256(head[: 8 + len(_SEALED)] + _UNKNOWN.encode())
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise PlasticError(f"{path} cannot be read: {error.strerror or error}") from error
    if found != digest.hexdigest().encode():
        raise PlasticError(
            f"{path} is damaged or cut off: its checksum is that of another content; take a copy of it, or write it "
            "anew"
        )
    return True


def mapping_in(path: Any, recipe: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the dict under a key of a recipe. Raises `PlasticError` where there is none."""
    value = recipe.get(key)
    if not isinstance(value, dict):
        raise PlasticError(f"{path}: damaged (its recipe has no {key})")
    return value
