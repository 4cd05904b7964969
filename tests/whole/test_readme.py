"""The README's Python runs as written, its table is what the committed JSON says, and the examples work."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "small.safetensors").exists()


SCRIPTS = [
    "experiments/tables.py",
    "experiments/gates_table.py",
    "benchmarks/zoo_table.py",
    "benchmarks/cost_table.py",
    "benchmarks/random_table.py",
]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_results_are_those_of_the_committed_json(script: str) -> None:
    command = [sys.executable, str(ROOT / script), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, f"run {script}"


@pytest.mark.slow
def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "own_model.py"), run_name="__main__")


@pytest.mark.slow
def test_after_shrinking() -> None:
    command = [sys.executable, str(ROOT / "examples" / "after_shrinking.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # it checks its own outputs
    parts = {
        "Each BatchNorm folded": [],
        "ONNX": ["onnx", "onnxscript", "onnxruntime"],
        "Linear layers in int8 by torchao": ["torchao"],
    }
    missing = {title: [n for n in packages if find_spec(n) is None] for title, packages in parts.items()}
    for title, names in missing.items():
        (section,) = re.findall(rf"\n{title}.*\n((?:  .*\n)+)", printed)
        assert ("skipped" if names else "largest error") in section
    if skipped := sorted({name for names in missing.values() for name in names}):
        pytest.skip(f"the rest of the example has passed, but {', '.join(skipped)} is not installed")
