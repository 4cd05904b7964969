"""A sample of the soaks of `make soak`: trainings that are killed, files that are damaged, and a long training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import random_kinds
import random_recipes
import soak_networks
from soak_recipes import KINDS, draw, smaller

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
def test_files_that_a_fuzzer_makes(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="the fuzzer is not installed: make fuzz")
    command = [sys.executable, str(BENCHMARKS / "soak_coverage.py"), "--count", "500", "--out", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    rows = json.loads((tmp_path / "found").read_text())["rows"]
    assert len(rows) == 15
    assert all(sum(row["counts"].values()) >= 500 for row in rows)
    assert any(row["last"] > row["first"] for row in rows)  # it sees what is reached


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


@pytest.mark.parametrize("seed", [402, 408, 414])  # an image, a signal and a sequence
def test_networks_that_change_their_size_again_and_again(seed: int) -> None:
    row = soak_networks.checked(draw(seed), 60.0)
    assert row["status"] == "ok", row
    assert row["resizes"] == 20
    assert row["cut"]
    assert row["added"]


def test_their_kinds_are_many_and_their_own() -> None:
    assert random_recipes.PARTS  # which have registered theirs
    assert len(KINDS) >= 70
    assert not KINDS.keys() & random_kinds.KINDS.keys()
    drawn = {node["kind"] for seed in range(400) for node in draw(seed)["nodes"]}
    assert drawn == KINDS.keys()


def test_their_recipes_are_data_and_reproduce() -> None:
    recipe = draw(3)
    assert json.loads(json.dumps(recipe)) == recipe == draw(3)
    assert all(r != recipe for r in smaller(recipe))


def test_what_fails_is_kept_with_what_makes_it_smaller(tmp_path: Path) -> None:
    """A network that has no time fails; it is kept with its recipe, and no more than once."""
    out = tmp_path / "found.json"
    for _ in range(2):
        code = soak_networks.main(["--seed", "420", "--count", "2", "--seconds", "0.02", "--out", str(out)])
        assert code == 1
    found = json.loads(out.read_text())
    assert [f["seed"] for f in found["failures"]] == [420, 421]
    assert all(f["status"] == "timeout" and f["recipe"]["nodes"] is not None for f in found["failures"])
    assert found["counts"]["status"] == {"timeout": 2}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be forked there")
def test_two_processes_that_are_killed(tmp_path: Path) -> None:
    """One of them is killed while it writes, and the other one ends by itself; once more, and both end alike."""
    command = [sys.executable, str(BENCHMARKS / "soak_ranks.py"), "--seed", "16", "--count", "1", "--kills", "1"]
    command += ["--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    trials = json.loads((tmp_path / "found.json").read_text())["trials"]
    assert {t["status"] for t in trials} == {"equal"}


@pytest.mark.slow
def test_numbers_next_to_zero(tmp_path: Path) -> None:
    """Times on a busy machine say little, so that only the weights are looked at."""
    command = [sys.executable, str(BENCHMARKS / "soak_denormals.py"), "--steps", "20", "--rounds", "3"]
    done = subprocess.run([*command, "--out", str(tmp_path / "a.json")], capture_output=True, text=True, check=False)
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["network"] for row in found["rows"]] == ["perceptron", "convolutions"], done.stderr
    assert not any(row["before"] for row in found["rows"])  # after so few steps
