"""The Python and the commands of the first page, of the tutorial and of docs/how-to run as they are written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.commands import succeed

DOCS = Path(__file__).parents[2] / "docs"
NEEDED = {  # what a page needs beside the packages of the tests
    "how-to/lightning.md": ("lightning.pytorch", "lightning is not installed: see `make integrations`"),
    "how-to/trainer.md": ("transformers", "transformers is not installed"),
}
QUICK = ["how-to/what-is-frozen-and-why.md"]
OTHERWISE = ["how-to/own-data.md", "how-to/distributed.md"]  # whose commands are run, too, in tests of their own
ALL = ["index.md", "tutorial.md", *sorted(f"how-to/{page.name}" for page in (DOCS / "how-to").glob("*.md"))]
RUN = [pytest.param(p, marks=[] if p in QUICK else pytest.mark.slow) for p in ALL if p not in OTHERWISE]


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def run(page: str) -> dict[str, object]:
    """Run the Python of a page, and return its names."""
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


def within(least: float, most: float) -> Callable[[str], bool]:
    """Whether a number that was printed lies between two others."""
    return lambda text: least <= float(text) <= most


PROMISED: dict[
    str, list[tuple[str, Callable[[str], bool]]]
] = {  # what a page says of what it prints: a pattern, and what must hold of its group
    "index.md": [
        (r"(\d+)% of the multiply-adds", within(1, 30)),
        (r"([\d.]+)% of the answers agree", within(90, 100)),
        (r"([\d.]+)% right", within(85, 100)),
    ],
    "tutorial.md": [
        (r"equal outputs: (\w+)", "True".__eq__),
        (r"([\d.]+)% right\n(?=site)", within(90, 100)),
        (r"([\d.]+)% right with", within(85, 100)),
    ],
    "how-to/resume.md": [(r"the same network: (\w+)", "True".__eq__)],
    "how-to/export-and-quantise.md": [(r"(\d+)% of the answers are those", within(80, 100))],
    "how-to/shrink-my-model.md": [(r"kept: \w.* with ([\d,]+) multiply", lambda n: int(n.replace(",", "")) < 50_000)],
}


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("page", RUN)
def test_python_of_a_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page in NEEDED:
        pytest.importorskip(NEEDED[page][0], reason=NEEDED[page][1])
    monkeypatch.chdir(tmp_path)
    assert run(page)
    printed = capsys.readouterr().out
    assert printed
    for promise, what in PROMISED.get(page, []):
        (found,) = re.findall(promise, printed)
        assert what(found), f"{page} printed {found}"


@pytest.mark.slow
def test_commands_on_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("how-to/own-data.md")
    printed = list[str]()
    for line in "".join(blocks("how-to/own-data.md", "sh")).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "plasticnet"
        printed.append(succeed(*arguments))
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 3
    assert (tmp_path / "page.html").exists()
    first, again = (tmp_path / "runs" / name / "summary.json" for name in ("houses", "again"))
    assert first.exists()
    assert again.exists()


@pytest.mark.slow
def test_script_of_several_processes(tmp_path: Path) -> None:
    (script,) = blocks("how-to/distributed.md", "python")
    (tmp_path / "train.py").write_text(script)
    (line,) = blocks("how-to/distributed.md", "sh")
    program, *arguments = shlex.split(line)
    assert program == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    local = {"GLOO_SOCKET_IFNAME": "lo" if Path("/sys/class/net/lo").exists() else "lo0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **local, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (width,) = re.findall(r"in_features=64, out_features=(\d+)", done.stdout)  # printed by one process
    assert 1 <= int(width) <= 0.4 * 64
