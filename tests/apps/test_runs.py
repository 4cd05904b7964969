"""The folder of a run: what is refused, what is replaced, and who may write into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from plasticnet import PlasticError
from plasticnet.apps import cli_train, runs
from plasticnet.apps.data import Data, Split, load_data
from plasticnet.apps.folder import locked
from plasticnet.apps.identity import describe_model, differences
from plasticnet.apps.loading import load_any
from tests.kit.commands import fail, invoke, succeed

MOONS = ["train", "--data", "moons", "--model", "mlp:6-4", "--epochs", "3", "--batch", "100"]
PRUNE = [*MOONS]
FOREIGN = [
    ("run.json", '{"architectures": ["BertModel"], "model_type": "bert"}\n'),
    ("run.json", '{\n  "data": "my own",\n  "model": "my own",\n  "modes": []\n}\n'),
    ("metrics.jsonl", '{"loss": 0.5, "step": 1}\n'),
    ("summary.json", '{\n  "loss": 0.5\n}\n'),
    ("report.html", "<!doctype html><title>my own</title>\n"),
    ("prune/checkpoint.safetensors", "my own"),
    ("grow", "a file where a folder would be"),
]

Failing = Callable[..., str]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(mode: str) -> set[str]:
    kinds = ["checkpoint", "checkpoint-before", "checkpoint-best", "compact"]
    return {f"{mode}/{kind}.safetensors" for kind in kinds}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Failing:
    return lambda *args: fail(monkeypatch, capsys, *args)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "pruned"
    succeed(*PRUNE, "--out", out)
    return out


@pytest.fixture
def run(pruned: Path, tmp_path: Path) -> Path:
    """A finished run, which the test may change."""
    return Path(shutil.copytree(pruned, tmp_path / "run"))


# -- starting where something is ----------------------------------------------------------------


def test_a_folder_with_a_run_is_refused(run: Path, failing: Failing) -> None:
    before = snapshot(run)
    for args in (PRUNE, [*MOONS, "--dense"]):
        line = failing(*args, "--out", run)
        assert all(word in line for word in ("--resume", "--overwrite", str(run), "prune/checkpoint.safetensors"))
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "left", ["run.json", "metrics.jsonl", "prune/checkpoint.safetensors", "prune/compact.safetensors"]
)
def test_what_is_left_of_a_run_is_refused(left: str, run: Path, failing: Failing) -> None:
    for name in snapshot(run):
        if name != left:
            (run / name).unlink()
    before = snapshot(run)
    line = failing(*MOONS, "--dense", "--out", run)
    assert all(word in line for word in ("--resume", "--overwrite", str(run), left))
    assert snapshot(run) == before


@pytest.mark.slow
def test_files_of_the_user_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "prune").mkdir()
    own = {"notes.txt": b"mine", "prune/notes.txt": b"mine too", "model.safetensors": b"and this"}
    for name, content in own.items():
        (tmp_path / name).write_bytes(content)
    succeed(*PRUNE, "--out", tmp_path)
    found = snapshot(tmp_path)
    assert {name: found[name] for name in own} == own
    assert found.keys() - own.keys() == {
        "run.json", "prepared.json", "metrics.jsonl", "summary.json", "report.html", *tensors("prune"),
    }  # fmt: skip


@pytest.mark.slow
def test_overwriting_removes_what_is_of_a_run_and_nothing_else(run: Path) -> None:
    shutil.copytree(run / "prune", run / "grow")
    (run / "grow/.checkpoint.safetensors.0123456789abcdef.partial").write_bytes(b"from a process that was killed")
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:7])  # so was the one that wrote this
    own = {"notes.txt": b"mine", "prune/weights.safetensors": b"mine too", "config.yaml": b"and this"}
    for name, content in own.items():
        (run / name).write_bytes(content)
    succeed(*MOONS, "--dense", "--lr", "0.01", "--out", run, "--overwrite")
    found = snapshot(run)
    assert {name: found[name] for name in own} == own
    assert found.keys() - own.keys() == {
        "run.json", "prepared.json", "metrics.jsonl", "summary.json", "report.html", *tensors("dense"),
    }  # fmt: skip
    assert not (run / "grow").exists()
    config = json.loads(found["run.json"])
    assert (config["mode"], config["config"]["lr"]) == ("dense", 0.01)
    assert all(json.loads(line)["run"] == "dense" for line in found["metrics.jsonl"].splitlines())


@pytest.mark.parametrize(("name", "content"), FOREIGN)
def test_a_file_of_the_user_in_the_way(name: str, content: str, tmp_path: Path, failing: Failing) -> None:
    """It has a name of ours, and nothing of a run in it."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    before = snapshot(tmp_path)
    for option in ([], ["--overwrite"]):
        assert str(tmp_path / name) in failing(*PRUNE, "--out", tmp_path, *option)
    assert snapshot(tmp_path) == before


def test_tensors_of_another_library_are_in_the_way(tmp_path: Path, failing: Failing) -> None:
    (tmp_path / "prune").mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "prune/compact.safetensors", {"format": "pt"})
    before = snapshot(tmp_path)
    assert "compact.safetensors" in failing(*PRUNE, "--out", tmp_path, "--overwrite")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "wrong",
    [
        ["--budget", "params=2"],
        ["--data", "mnist"],
        ["--model", "nope"],
        ["--lr", "-1"],
        ["--resume"],
        ["--device", "tpu"],
    ],
)
def test_overwriting_waits_until_the_rest_is_accepted(wrong: list[str], run: Path, failing: Failing) -> None:
    before = snapshot(run)
    failing(*PRUNE, "--out", run, "--overwrite", *wrong)
    assert snapshot(run) == before


# -- one process at a time ----------------------------------------------------------------------


def test_a_folder_in_which_a_process_is_at_work(run: Path, failing: Failing) -> None:
    before = snapshot(run)
    with locked(run):
        for option in ("--resume", "--overwrite"):
            assert "another process" in failing(*PRUNE, "--out", run, option)
    assert snapshot(run) == before


def test_a_new_folder_in_which_a_process_has_just_begun(tmp_path: Path, failing: Failing) -> None:
    with locked(tmp_path / "new"):
        assert "another process" in failing(*PRUNE, "--out", tmp_path / "new")
    assert snapshot(tmp_path) == {}


@pytest.mark.slow
def test_a_killed_process_gives_its_folder_free(run: Path, failing: Failing) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom plasticnet.apps.folder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(600)\n"
    )
    before = snapshot(run)
    with subprocess.Popen([sys.executable, "-c", program, str(run)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"in\n"
            assert "another process" in failing(*PRUNE, "--out", run, "--resume")
            os.kill(process.pid, signal.SIGSTOP)  # one that does nothing is at work all the same
            assert "another process" in failing(*PRUNE, "--out", run, "--overwrite")
        finally:
            process.kill()
    left = snapshot(run)
    assert len(left) == len(before) + 1  # the file of the lock, which blocks nobody
    succeed(*PRUNE, "--out", run, "--resume")
    assert snapshot(run).keys() == before.keys()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written(
    code: int, run: Path, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(run)):
            raise OSError(code, os.strerror(code), path)
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    before = snapshot(run)
    for option in ("--resume", "--overwrite"):
        line = failing(*PRUNE, "--out", run, option)
        assert str(run) in line
        assert "written" in line
    assert snapshot(run) == before


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, failing: Failing) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        assert str(out) in failing(*PRUNE, "--out", out)
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(sys.platform == "win32", reason="the lock is made in another way there")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unknown(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert "without locks" in succeed(*MOONS, "--dense", "--out", tmp_path)


# -- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{}, {"notes.txt": "mine"}, {"run.json": '{"model_type": "bert"}'}])
def test_resuming_where_no_run_was(content: dict[str, str], tmp_path: Path, failing: Failing) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    before = snapshot(tmp_path)
    message = "move it, or choose another folder" if "run.json" in content else "no run in"
    assert message in failing(*PRUNE, "--out", tmp_path, "--resume")
    assert "no run in" in failing(*PRUNE, "--out", tmp_path / "new", "--resume")
    assert not (tmp_path / "new").exists()
    assert snapshot(tmp_path) == before


CHANGES = {
    "epochs": "5", "k": "5", "k-end": "9", "price": "0.2", "cost": "units", "estimator": "ar",
    "gates": "batch", "inputs": "1", "start": "2", "batch": "50", "lr": "0.5",
    "gate-lr": "0.5", "seed": "9", "model": "mlp:6-5", "data": "digits",
}  # fmt: skip


@pytest.mark.parametrize("checkpoint", [True, False])
def test_resuming_names_everything_that_differs(checkpoint: bool, run: Path, failing: Failing) -> None:
    """Also before the first checkpoint, and all at once."""
    if not checkpoint:
        for path in (run / "prune").glob("checkpoint*"):
            path.unlink()
    before = snapshot(run)
    options = [text for name, value in CHANGES.items() for text in (f"--{name}", value)]
    line = failing(*PRUNE, "--out", run, "--resume", *options)
    for name, value in CHANGES.items():
        then = {"lr": "0.003", "gate-lr": "0.1", "k-end": "none", "data": "moons"}.get(name, "")
        assert f"{name.replace('-', '_')}: {then}" in line
        assert f"{value} now" in line or f"{float(value)} now" in line
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["k-end", "price", "inputs", "gate-lr"])
def test_resuming_names_nothing_else(name: str, run: Path, failing: Failing) -> None:
    line = failing(*PRUNE, "--out", run, "--resume", f"--{name}", CHANGES[name])
    assert line.count(" now") == 1


@pytest.mark.slow
def test_resuming_with_fewer_or_more_modes(run: Path, failing: Failing, tmp_path: Path) -> None:
    assert "mode: prune then, compare now" in failing(*MOONS, "--compare", "--out", run, "--resume")
    succeed(*MOONS, "--compare", "--out", tmp_path / "both")
    before = snapshot(tmp_path / "both")
    line = failing(*PRUNE, "--out", tmp_path / "both", "--resume")
    assert "mode: compare then, prune now" in line
    (tmp_path / "both/grow/checkpoint.safetensors").write_bytes(before["prune/checkpoint.safetensors"])
    (tmp_path / "both/summary.json").unlink()  # as if it had been interrupted
    before = snapshot(tmp_path / "both")
    assert "mode: prune then, grow now" in failing(*MOONS, "--compare", "--out", tmp_path / "both", "--resume")
    for name in ("checkpoint", "checkpoint-before", "checkpoint-best"):
        (tmp_path / f"both/grow/{name}.safetensors").write_bytes(before["prune/checkpoint.safetensors"][:-9])
    before = snapshot(tmp_path / "both")
    assert "damaged" in failing(*MOONS, "--compare", "--out", tmp_path / "both", "--resume")
    assert snapshot(tmp_path / "both") == before  # though dense and prune could have been resumed


@pytest.mark.parametrize("checkpoint", [True, False])
def test_resuming_with_other_data_of_the_same_name(
    checkpoint: bool, run: Path, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checkpoint:
        for path in (run / "prune").glob("checkpoint*"):
            path.unlink()
    before = snapshot(run)
    monkeypatch.setattr(cli_train, "load_any", lambda name, how, seed: load_any(name, how, seed + 1))
    line = failing(*PRUNE, "--out", run, "--resume")
    assert "content of the data" in line
    assert line.count(" now") == 1
    assert snapshot(run) == before


def test_resuming_where_the_data_may_lie_elsewhere(run: Path, tmp_path: Path) -> None:
    before = snapshot(run)
    succeed(*PRUNE, "--out", run, "--resume", "--data-dir", tmp_path)
    after = snapshot(run)
    assert after["run.json"] == before["run.json"]
    assert after["prune/compact.safetensors"] == before["prune/compact.safetensors"]


@pytest.mark.slow
def test_the_report_of_a_resumed_run_shows_what_it_began_with(run: Path) -> None:
    config = json.loads((run / "run.json").read_text())
    config["record"] |= {"threads": 77, "processor": "a machine of before"}
    (run / "run.json").write_text(json.dumps(config, indent=2))
    before = (run / "run.json").read_bytes()
    text = succeed(*PRUNE, "--out", run, "--resume")
    assert "threads: 77 then, 1 now" in text
    assert (run / "run.json").read_bytes() == before
    page = (run / "report.html").read_text()
    assert "<td>threads</td><td>77</td>" in page
    assert "<td>processor</td><td>a machine of before</td>" in page
    assert "threads" not in (run / "summary.json").read_text()


def test_a_killed_resumption_loses_no_records(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records of the epochs that are over are given anew, and metrics.jsonl never holds less than before."""
    before = (run / "metrics.jsonl").read_bytes()
    train = runs.train_run

    def interrupted(*args: Any, on_epoch: Callable[[dict[str, Any]], None], **options: Any) -> Any:
        def stop(record: dict[str, Any]) -> None:
            on_epoch(record)
            raise KeyboardInterrupt

        return train(*args, on_epoch=stop, **options)

    monkeypatch.setattr(runs, "train_run", interrupted)
    found = invoke(*PRUNE, "--out", run, "--resume")
    assert found.exit_code == 130
    assert f"interrupted, and saved in {run}: plasticnet train --resume --out {run} goes on" in found.stdout
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_was_killed_before_its_data_were_noted(run: Path) -> None:
    """The settings are there, and nothing else."""
    before = (run / "prepared.json").read_bytes()
    for path in [p for p in run.rglob("*") if p.is_file() and p.name != "run.json"]:
        path.unlink()
    succeed(*PRUNE, "--out", run, "--resume")
    assert (run / "prepared.json").read_bytes() == before


@pytest.mark.parametrize("left", ["", "one line", "too many", "torn"])
def test_the_records_are_those_that_the_checkpoint_knows(left: str, run: Path) -> None:
    """A killed process may have written a line too few, half of one, or some of epochs that are trained once more."""
    path = run / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text({"": "", "one line": lines[0], "too many": whole * 2, "torn": whole[:-9]}[left])
    succeed(*PRUNE, "--out", run, "--resume")
    assert path.read_text() == whole


# -- the parts ----------------------------------------------------------------------------------


def test_differences() -> None:
    assert differences({"lr": 0.003, "old": 1}, {"lr": 0.003}) == ""
    found = differences({"lr": 0.003, "inputs": [], "budget": None, "text": "one\ntwo\nthree"},
        {"lr": 0.5, "inputs": ["1", "fc*"], "budget": {"macs": 0.3, "params": None}, "text": "one\n2\n3", "new": 1},
    )  # fmt: skip
    assert found == (
        "lr: 0.003 then, 0.5 now; inputs: none then, 1,fc* now; budget: none then, macs=0.3 now; "
        "text: two then, 2 now; new: not recorded then, 1 now"
    )


class Odd(nn.Module):
    """Shows the address of a function, and keeps a parameter that its text does not show."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.act, self.scale = lambda x: x, nn.Parameter(torch.ones(width))

    def extra_repr(self) -> str:
        return f"act={self.act}"


def test_the_structure_of_a_model_is_what_it_is_compared_by() -> None:
    first, second = Odd(), Odd()
    assert repr(first) != repr(second)
    assert describe_model(first) == describe_model(second)
    assert describe_model(first) != describe_model(Odd(4))
    assert describe_model(first) != describe_model(Odd().double())


def test_the_hash_of_data_is_that_of_their_content() -> None:
    moons = load_data("moons")
    parts = [moons.train, moons.val, moons.test]
    assert Data(*[Split(p.x.clone().t().contiguous().t(), p.y.clone()) for p in parts]).sha256 == moons.sha256
    other = moons.test.y.clone()
    other[-1] = 1 - other[-1]
    for changed in (
        [moons.train, moons.val, Split(moons.test.x, other)],
        [moons.train, moons.test, moons.val],
        [Split(moons.train.x.double(), moons.train.y), moons.val, moons.test],
        [Split(moons.train.x.reshape(-1, 10, 10), moons.train.y), moons.val, moons.test],
    ):
        assert Data(*changed).sha256 != moons.sha256


def test_errors_of_the_folder_reach_python_as_they_are(run: Path) -> None:
    assert isinstance(invoke(*PRUNE, "--out", run).exception, PlasticError)
