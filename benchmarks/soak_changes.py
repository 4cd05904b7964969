"""Changes sound files at random, for soak_files.py."""

from __future__ import annotations

import json
import random
from hashlib import sha256
from typing import Any

# What is put in the place of a value of JSON.
VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, -(2**63), 1e999, 0.5, float("nan"), "", "x", "0", "../../x", "\x00",
    "é\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace"), [], {}, [[]], [0], ["0", 0], {"": {}},
    "<script>", {"<script>": "<script>"}, 10**400, "\ud800",
    {"tensor": "0"}, {"list": 3}, {"dict": [[[], 1]]}, {"tuple": [{"tuple": []}]}, "F64", "I64", "0.weight",
]  # fmt: skip


def changed(draw: random.Random, data: bytes, suffix: str) -> bytes:
    """Return the content of a sound file after some changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if suffix == ".safetensors" and draw.random() < 0.6:
            data = header_changed(draw, data)
        elif suffix == ".json" and draw.random() < 0.6:
            data = json_changed(draw, data)
        elif suffix == ".jsonl" and draw.random() < 0.6:
            lines = data.splitlines(keepends=True) or [b""]
            at = draw.randrange(len(lines))
            data = b"".join([*lines[:at], json_changed(draw, lines[at], None) + b"\n", *lines[at + 1 :]])
        else:
            data = bytes_changed(draw, data)
    return sealed(data) if draw.random() < 0.7 else data


def bytes_changed(draw: random.Random, data: bytes) -> bytes:
    """Return bytes after one change."""
    if not data:
        return data
    at, length = draw.randrange(len(data)), min(len(data), draw.choice((1, 1, 2, 8, 64)))
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + length :]
    if kind == 2:
        return data[: at + length] + data[at:]
    if kind == 3:
        number = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        return data[:at] + number[: draw.choice((1, 2, 4, 8))] + data[at + length :]
    return data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :]


def json_changed(draw: random.Random, data: bytes, indent: int | None = 2) -> bytes:
    """Return JSON after one change of a value or a key; where it is none any more, bytes are changed."""
    try:
        return json.dumps(node_changed(draw, json.loads(data)), indent=indent).encode()
    except (ValueError, RecursionError):
        return bytes_changed(draw, data)


def node_changed(draw: random.Random, node: Any) -> Any:
    """Return plain data in which one value, somewhere, is another one, is missing, is doubled, or lies deep."""
    if not isinstance(node, dict | list) or not node or draw.random() < 0.1:
        return draw.choice(VALUES) if draw.random() < 0.97 else nested(draw.choice((100, 3000)))
    if isinstance(node, list):
        at, kind = draw.randrange(len(node)), draw.randrange(8)
        if kind == 0:
            return node[:at] + node[at + 1 :]
        return [*node, node[at]] if kind == 1 else [*node[:at], node_changed(draw, node[at]), *node[at + 1 :]]
    key, kind = draw.choice(list(node)), draw.randrange(8)
    if kind == 0:
        return {k: v for k, v in node.items() if k != key}
    if kind == 1:
        return {**node, str(draw.choice(VALUES)): draw.choice(VALUES)}
    return {**node, key: node_changed(draw, node[key])}


def nested(depth: int) -> Any:
    """Return lists within lists."""
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def header_changed(draw: random.Random, data: bytes) -> bytes:
    """Return a safetensors file after one change of its header, or of the recipe in it."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        meta = header["__metadata__"]
        if draw.random() < 0.6:
            recipe = json.loads(meta["plasticnet"])
            inner = {k: v for k, v in recipe.items() if k != "checksum"}
            inner = node_changed(draw, inner)
            first = {"checksum": recipe["checksum"]} if "checksum" in recipe and isinstance(inner, dict) else {}
            meta["plasticnet"] = json.dumps({**first, **inner} if isinstance(inner, dict) else inner)
        else:
            header = {"__metadata__": meta, **node_changed(draw, {k: v for k, v in header.items() if k[0] != "_"})}
        text = json.dumps(header, separators=(",", ":")).encode()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return bytes_changed(draw, data)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def sealed(data: bytes) -> bytes:
    """Return a file of ours with the checksum of what it has become; any other as it is."""
    begin = data.find(b'{\\"checksum\\": \\"')
    if begin < 0:
        return data
    begin += len(b'{\\"checksum\\": \\"')
    bare = data[:begin] + b"0" * 64 + data[begin + 64 :]
    return bare[:begin] + sha256(bare).hexdigest().encode() + bare[begin + 64 :]
