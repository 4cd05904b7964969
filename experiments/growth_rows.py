"""Rows of results about growth, each of which is measured once for each rule of growth."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from common import environment, write, written

import plasticnet

Row = dict[str, Any]
SOURCE = Path(plasticnet.__file__).parent
FILES = (
    *(f"growing/{name}.py" for name in ("growth", "verdicts", "moves", "depth", "rule", "narrow")),
    *(f"learning/{name}.py" for name in ("missed", "closing")),
)


def digest(source: str) -> str:
    """The first digits of a hash of some code, in which comments and docstrings do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return sha256(ast.unparse(tree).encode()).hexdigest()[:8]


@cache
def rule() -> str:
    """The digest of the rule of growth."""
    return digest("\n".join((SOURCE / name).read_text() for name in FILES))


def row(name: str, settings: Mapping[str, Any], key: Mapping[str, Any], run: Callable[[], Row], grows: bool) -> Row:
    """The row of ``results/NAME.json`` with these values, which is measured and written if it is not there.

    Args:
        name: The name of the results.
        settings: The settings that all rows share.
        key: The values by which the row is found.
        run: Measures the rest of the row.
        grows: Whether the row depends on the rule of growth. If so, a row of another rule is replaced.
    """
    of = {**key, "rule": rule() if grows else None}
    rows = written(name)
    for found in rows:
        if all(found.get(k) == v for k, v in of.items()):
            return found
    made = {**of, "commit": environment()["commit"], **run()}
    others = [r for r in rows if any(r.get(k) != v for k, v in key.items())]
    write(name, dict(settings), [*others, made])
    print({k: v for k, v in made.items() if k not in ("widths", "rule", "commit")}, flush=True)
    return made


def path(widths: list[str]) -> str:
    """Widths after every epoch, in which those that have not changed are left out."""
    return " ".join(w for before, w in zip([None, *widths], widths, strict=False) if w != before)
