"""The Python of the README and of the pages runs as written, tables are what the JSON says, and the examples work."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from plasticnet.apps.data import load_data
from plasticnet.apps.models import factory
from tests.kit.commands import succeed
from tests.kit.heavy import heavy

ROOT = Path(__file__).parents[2]


def wordless(text: str) -> list[str]:
    """Lines with a sign in the place of each number, because these are not the same on every machine."""
    return [re.sub(r"[\d.,e%-]*\d[\d.,e%-]*", "#", " ".join(line.split())) for line in text.splitlines()]


def rights(text: str) -> list[float]:
    """The shares of right answers that a text reports, in percent."""
    return [float(number) for number in re.findall(r"([\d.]+)% right", text)]


@pytest.mark.slow
def test_python_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks_of("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    comments = re.findall(r"^# (.*(?:multiply-adds|right))$", (ROOT / "README.md").read_text(), re.MULTILINE)
    said = "\n".join([*blocks_of("README.md", "text"), *comments])
    assert [line for line in wordless(said) if line] == [line for line in wordless(printed) if line]
    assert len(rights(said)) == 3
    assert rights(said) == pytest.approx(rights(printed), abs=2)  # percent


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_python_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of("docs/guide.md", "python")
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/guide.md", "exec"), names)
    assert (tmp_path / "small.safetensors").exists()


@pytest.mark.slow
@heavy
@pytest.mark.parametrize("way", [(), ("--ddp",)])
def test_example_of_several_processes(way: tuple[str, ...]) -> None:
    command = [sys.executable, str(ROOT / "examples" / "distributed.py"), *way]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert f"saved under {'ddp' if way else 'fsdp'}" in found.stdout
    (share,) = re.findall(r"(\d+)% of the multiply-adds", found.stdout)
    assert int(share) <= 34
    (right,) = re.findall(r"([\d.]+) % right", found.stdout)
    assert float(right) > 75


def blocks_of(page: str, kind: str) -> list[str]:
    """The blocks of code of one kind in a page."""
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def write_own_data(folder: Path) -> None:
    """What the commands of docs/shrink.md read: images in folders, arrays, tables, and the weights for these."""
    digits = load_data("digits").train
    for i, (x, y) in enumerate(zip(digits.x[:40], digits.y[:40], strict=True)):
        file = folder / "photos" / str(int(y)) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((x[0].numpy() + 1) * 127).astype(np.uint8)).save(file)
    np.savez(folder / "digits.npz", x=digits.x.numpy(), y=digits.y.numpy())
    rooms = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    columns = {**{name: rooms[:, i] for i, name in enumerate("abcd")}, "price": rooms.sum(1)}
    rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (folder / "houses.csv").write_text("\n".join(rows) + "\n")
    parquet.write_table(pyarrow.table(columns), folder / "houses.parquet")
    torch.save(factory("mlp:64-32", (4,), 1)().state_dict(), folder / "houses.pt")


@pytest.mark.slow
def test_code_of_the_page_about_shrinking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    python, page = blocks_of("docs/shrink.md", "python"), (ROOT / "docs" / "shrink.md").read_text()
    (tmp_path / "own.py").write_text(python[0])
    names: dict[str, object] = {}
    printed = []
    for block in python:
        exec(compile(block, "docs/shrink.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    (report,) = re.findall(r"<!-- report:begin -->\n+```text\n(.*?)```", page, re.DOTALL)

    assert wordless(report) in [wordless(text) for text in printed]  # numbers are not those of every machine
    write_own_data(tmp_path)
    (commands,) = blocks_of("docs/shrink.md", "sh")
    lines = commands.replace("\\\n", " ").splitlines()
    assert len(lines) >= 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "plasticnet"
        succeed(*arguments)
        assert (tmp_path / arguments[arguments.index("--out") + 1] / "compact.safetensors").exists()
    sys.modules.pop("own", None)


SCRIPTS = [
    "experiments/tables.py",
    "experiments/gates_table.py",
    "experiments/growth_table.py",
    "experiments/integrations_table.py",
    "experiments/packages_table.py",
    "experiments/readme_table.py",
    "experiments/shrinking_table.py",
    "experiments/sklearn_table.py",
    "benchmarks/zoo_table.py",
    "benchmarks/cost_table.py",
    "benchmarks/compiled_table.py",
    "benchmarks/random_table.py",
    "benchmarks/soak_table.py",
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
@heavy
def test_ranks_of_adapters() -> None:
    """The example itself compares what PEFT loads and merges with the network."""
    pytest.importorskip("peft")
    command = [sys.executable, str(ROOT / "examples" / "lora_ranks.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ranks = [int(rank) for rank in re.findall(r"^ ?(\d+) of 16  bert", printed, re.MULTILINE)]
    assert len(ranks) == 10
    assert sum(ranks) == 40
    assert min(ranks) <= 2 < 5 <= max(ranks)
    before, after = re.findall(r"accuracy before: ([\d.]+)%.*learned: ([\d.]+)%", printed)[0]
    assert min(float(before), float(after)) > 95
    assert len(re.findall(r"the outputs differ by at most", printed)) == 2


@pytest.mark.slow
@heavy
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
