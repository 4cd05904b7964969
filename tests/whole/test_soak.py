"""A sample of the soaks of `make soak`: trainings that are killed, files that are damaged, and a long training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be forked there")
def test_a_training_that_is_killed_again_and_again(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "soak_kills.py"), "--count", "2", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    trials = json.loads((tmp_path / "found.json").read_text())["trials"]
    assert sum(sum(t["kills"].values()) for t in trials) >= 2
    assert {t["status"] for t in trials} == {"equal"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is found in another way")
def test_files_that_are_damaged_or_crafted() -> None:
    command = [sys.executable, str(BENCHMARKS / "soak_files.py"), "--seed", "10000000", "--count", "750"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is found in another way")
def test_a_long_training_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "soak_long.py"), "--steps", "120", "--resizes", "40"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")], capture_output=True, text=True, check=False
    )
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    counted = ("tensors", "their KiB", "states of the optimizer", "hooks", "open files")
    assert not [name for name in counted if found[name]["grew"]], (
        done.stdout,
        done.stderr,
    )  # times and caches are left
