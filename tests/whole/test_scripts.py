"""The scripts of experiments and benchmarks find in each other, and in the library, what they import by name."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem: path for folder in ("experiments", "benchmarks") for path in (ROOT / folder).glob("*.py")}


def defined(path: Path) -> set[str]:
    """The names that a script has at its top level."""
    found = set[str]()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_what_a_script_imports_is_there(name: str) -> None:
    for node in ast.walk(ast.parse(SCRIPTS[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        names = {alias.name for alias in node.names}
        if node.module in SCRIPTS:
            assert names <= defined(SCRIPTS[node.module]), f"{name}: from {node.module}"
        elif node.module.split(".")[0] == "plasticnet":
            module = import_module(node.module)
            lacking = {n for n in names if not hasattr(module, n)}
            assert not lacking, f"{name}: from {node.module} import {lacking}"
