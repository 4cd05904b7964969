"""The flow of imports: what points upwards, sideways or around is refused, also where it is for types only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed")
ROOT = Path(__file__).parents[2]


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the package that lies in a folder."""
    command = [sys.executable, "-c", "import importlinter.cli as cli; cli.lint_imports_command()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    config = ["--config", str(ROOT / ".importlinter")]
    return subprocess.run([*command, *config], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the library, to spoil."""
    shutil.copytree(ROOT / "src" / "plasticnet", tmp_path / "plasticnet", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_library_keeps_the_contracts(package: Path) -> None:
    found = linted(package)
    assert found.returncode == 0, found.stdout
    assert "Contracts: 2 kept, 0 broken" in found.stdout


@pytest.mark.parametrize(
    ("module", "line", "named"),
    [
        ("cost/entries.py", "from plasticnet.gates import site", "plasticnet.cost.entries -> plasticnet.gates.site"),
        ("learning/draws.py", "import plasticnet.surgery.plan", "plasticnet.learning is not allowed to import"),
        ("tools/ranks.py", "import plasticnet.net", "plasticnet.tools.ranks -> plasticnet.net"),
        (
            "gates/gated.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from plasticnet.net import PlasticNet",
            "plasticnet.gates.gated -> plasticnet.net",
        ),
        ("learning/estimators.py", "import plasticnet.learning.passes", "No circles within a folder BROKEN"),
        ("elsewhere.py", "", "plasticnet.elsewhere"),
    ],
)
def test_a_planted_import_is_refused(module: str, line: str, named: str, package: Path) -> None:
    path = package / "plasticnet" / module
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    found = linted(package)
    assert found.returncode != 0
    assert named in found.stdout
