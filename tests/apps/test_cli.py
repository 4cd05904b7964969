"""The command line: what it writes, going on after an interruption, and one line for what is wrong."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plasticnet import PlasticError, Schedule, load, save
from plasticnet.apps.cli import main
from plasticnet.apps.models import MLP, LeNet5, factory
from tests.kit.commands import fail, invoke, succeed

MOONS = ["train", "--data", "moons", "--model", "mlp:6-4", "--epochs", "3", "--batch", "100", "--inputs", "1"]
RUNS = {"prune": ["prune"], "grow": ["grow"], "dense": ["dense"], "compare": ["dense", "prune", "grow"]}
FLAGS = {"prune": [], "grow": ["--growth"], "dense": ["--dense"]}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(found: Any) -> Any:
    """Without what was timed, in the profiles too."""
    if isinstance(found, list):
        return [timeless(f) for f in found]
    return {k: timeless(v) for k, v in found.items() if "seconds" not in k} if isinstance(found, dict) else found


# -- train ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("cli") / "new" / "both"
    assert "test score" in succeed(*MOONS, "--compare", "--out", out)
    return out


def check(out: Path, runs: Sequence[str]) -> None:
    config = json.loads((out / "run.json").read_text())
    assert {"data": "moons", "model": "mlp:6-4", "device": "cpu"}.items() <= config.items()
    assert {"epochs": 3, "seed": 0, "inputs": ["1"]}.items() <= config["config"].items()
    assert {"torch", "plasticnet", "python"} <= config["record"].keys()
    records = metrics(out)
    assert [(r["run"], r["epoch"]) for r in records] == [(run, e) for run in runs for e in (1, 2, 3)]
    for r in records:
        assert {"k", "loss", "val_loss", "val_score", "units", "parameters", "macs"} <= r.keys()
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == list(runs)
    for run, s in summary.items():
        small = load(out / run / "compact.safetensors", factory("mlp:6-4", (100,), 2))
        assert sum(p.numel() for p in small.parameters()) == s["parameters"]
        assert small(torch.randn(5, 100)).shape == (5, 2)
        assert 0 <= s["test_score"] <= 1
    check_page((out / "report.html").read_text(), runs)


def check_page(page: str, runs: Sequence[str]) -> None:
    assert page.count("<svg") == page.count("</svg>") == 4
    for run in runs:
        assert f"<td>{run}</td>" in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r'(src|href|action|data|url)\s*[=(]\s*["\']?\s*(https?:)?//', without_namespaces)
    assert not re.search(r"<(script|link|iframe|img|object)|@import|@font-face", page)


def test_train_both(finished: Path) -> None:
    check(finished, RUNS["compare"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["prune", "grow", "dense"])
def test_train_one(mode: str, tmp_path: Path, finished: Path) -> None:
    succeed(*MOONS, *FLAGS[mode], "--out", tmp_path)
    check(tmp_path, RUNS[mode])
    assert timeless(metrics(tmp_path)) == timeless([r for r in metrics(finished) if r["run"] == mode])
    name = f"{mode}/compact.safetensors"
    assert (tmp_path / mode / "compact.safetensors").read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 5, 9])
def test_resume(stop: int, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of an epoch of the first, the second or the third run."""
    steps: list[int] = []
    step = Schedule.step

    def interrupted(schedule: Schedule, val_loss: float | None = None) -> Any:
        steps.append(1)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return step(schedule, val_loss)

    monkeypatch.setattr(Schedule, "step", interrupted)
    assert invoke(*MOONS, "--compare", "--out", tmp_path).exit_code != 0
    assert not (tmp_path / "summary.json").exists()
    if stop > 1:
        assert len(metrics(tmp_path)) == stop - 1
    succeed(*MOONS, "--compare", "--out", tmp_path, "--resume")
    assert len(steps) == 9 + 1  # and no epoch was trained twice
    check(tmp_path, RUNS["compare"])
    assert timeless(metrics(tmp_path)) == timeless(metrics(finished))
    for run in RUNS["compare"]:
        assert (tmp_path / run / "compact.safetensors").read_bytes() == (
            finished / run / "compact.safetensors"
        ).read_bytes()


def test_resume_of_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fail(monkeypatch, capsys, *MOONS, "--out", tmp_path, "--resume")
    assert f"there is no run in {tmp_path}, which has no run.json: start one without --resume" in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def started(tmp_path: Path, run: Path) -> Path:
    """A copy of a finished run, which a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("cli") / "run"
    succeed(*MOONS, "--out", out)
    return out


def test_resume_with_other_settings_is_refused(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*MOONS, "--out", started, "--resume"]
    assert "another configuration" in fail(monkeypatch, capsys, *again, "--seed", "7")


def test_a_refused_resume_leaves_the_run_alone(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in started.rglob("*") if p.is_file()}
    fail(monkeypatch, capsys, *MOONS, "--out", started, "--resume", "--seed", "7")
    assert {p.name: p.read_bytes() for p in started.rglob("*") if p.is_file()} == before


def test_a_refused_option_leaves_the_run_before_it_alone(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in started.rglob("*") if p.is_file()}
    for budget in ("params=2", "latency_ms=1", "units=0.001"):
        fail(monkeypatch, capsys, *MOONS, "--out", started, "--budget", budget, "--overwrite")
    assert {p.name: p.read_bytes() for p in started.rglob("*") if p.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("change", [["--model", "mlp:9-9"], ["--data", "digits"]])
def test_resume_with_another_model_or_data_is_refused(
    change: list[str], started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (started / "run.json").read_bytes()
    line = fail(monkeypatch, capsys, *MOONS, "--out", started, "--resume", *change)
    assert "mlp:6-4 on moons" in line
    assert (started / "run.json").read_bytes() == before


DAMAGED = [b"", b"{}", b"[]", b"not json", b'{\n  "data": "moons",\n  "mod', b"\xff\xfe\x00", b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_resume_of_a_damaged_run_names_the_file_and_a_way_out(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.json"
    config.write_bytes(content)
    line = fail(monkeypatch, capsys, *MOONS, "--out", tmp_path, "--resume")
    assert f"--resume: {config} " in line
    assert "is damaged" in line or "does not hold the settings of a run" in line
    assert not re.search(r"no run|Expecting|Errno|codec", line)
    if "--overwrite" not in line:  # as where nothing shows that the file was of a run
        assert "move it" in line
        config.unlink()
    succeed(*MOONS, "--out", tmp_path, "--overwrite")


@pytest.mark.parametrize("left", ["metrics.jsonl", "summary.json", "prune/checkpoint.safetensors"])
def test_resume_of_what_is_left_of_a_run(
    left: str, started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in [p for p in started.rglob("*") if p.is_file() and p != started / left]:
        path.unlink()
    line = fail(monkeypatch, capsys, *MOONS, "--out", started, "--resume")
    assert f"there is no run in {started}, which has no run.json: replace what is left" in line
    succeed(*MOONS, "--out", started, "--overwrite")


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 100, None])
def test_resume_with_damaged_checkpoints_names_them_and_a_way_out(
    content: bytes | None, started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted((started / "prune").glob("checkpoint*"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    line = fail(monkeypatch, capsys, *MOONS, "--out", started, "--resume")
    assert "damaged or cut off" in line
    assert line.endswith(f"in {started / 'prune'} to start this run anew")
    assert all(path.name in line.partition("; remove ")[2] for path in paths)
    for path in paths:
        path.unlink()
    succeed(*MOONS, "--out", started, "--resume")


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-before", "checkpoint-best", "checkpoint-next"])
def test_a_folder_in_the_place_of_a_checkpoint_is_named(
    name: str, started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may hold what the user wants to keep; nothing is written before it is out of the way."""
    path = started / "prune" / f"{name}.safetensors"
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in started.rglob("*") if p.is_file()}
    line = fail(monkeypatch, capsys, "train", "--out", started, "--resume")
    assert f"{path} is a folder, and in the way of a checkpoint: move it, or remove it" in line
    assert {p: p.read_bytes() for p in started.rglob("*") if p.is_file()} == before
    path.rename(started / "moved")
    succeed("train", "--out", started, "--resume")


# -- report, export --------------------------------------------------------------------------


def test_report_is_written_anew(finished: Path) -> None:
    page = finished / "report.html"
    before = page.read_text()
    page.unlink()
    succeed("report", finished)
    check_page(page.read_text(), RUNS["compare"])
    assert page.read_text().count("<td>") == before.count("<td>")


def test_report_is_the_same_page(tmp_path: Path) -> None:
    succeed(*MOONS, "--out", tmp_path)
    before = (tmp_path / "report.html").read_text()
    succeed("report", tmp_path)
    assert (tmp_path / "report.html").read_text() == before


@pytest.mark.parametrize("file", ["small.pt2", pytest.param("small.onnx", marks=pytest.mark.slow)])
def test_export(file: str, finished: Path, tmp_path: Path) -> None:
    saved, out = finished / "prune" / "compact.safetensors", tmp_path / file
    if out.suffix == ".onnx":
        ort = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    text = succeed("export", saved, "--model", "mlp:6-4", "--input", "1,100", "--classes", "2", "--out", out)
    assert "any batch size" in text
    x = torch.randn(3, 100)
    y = load(saved, factory("mlp:6-4", (100,), 2))(x)
    if out.suffix == ".onnx":
        session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        found = torch.export.load(out).module()(x)
    torch.testing.assert_close(found, y)


def test_export_knows_the_input_of_known_models(tmp_path: Path) -> None:
    save(LeNet5(), tmp_path / "m")
    succeed("export", tmp_path / "m", "--model", "lenet5", "--out", tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").exists()


# -- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("inspect nope", "unknown model 'nope'"),
        ("inspect mlp:a", "mlp:300-100"),
        ("inspect torchvision:nope --input 1,3,64,64", "nope"),
        ("inspect no_such_package:f", "no_such_package"),
        ("inspect os:getcwd", "not an nn.Module"),
        ("inspect lenet5 --input 1,x", "1,3,224,224"),
        ("inspect lenet5 --input 1,1,0,28", "1,3,224,224"),
        ("inspect lenet5 --input 1,1,-28,28", "1,3,224,224"),
        ("inspect lenet5 --input 1,1,32,32", r"lenet5 reads images of the shape \(1, 28, 28\)"),
        ("inspect lenet5 --input 1", "does not run on the example inputs"),
        ("train --growth --dense --out OUT", "--growth and --dense"),
        ("train --dense --out OUT", "can only grow"),
        ("train --budget params=0.5 --price 1 --out OUT", "--budget and --price"),
        ("train --device tpu --out OUT", "--device tpu"),
        ("train --model mlp:4 --dense --price 1 --out OUT", "--dense --price"),
        ("train --task regression --out OUT", "--task regression: digits are classes"),
        ("train --data digits --target y --out OUT", "--target says nothing about --data digits"),
        ("train --data nope --out OUT", "--data nope: there is no such file or folder; give digits"),
        ("train --data mnist --out OUT", "--data-dir"),
        ("train --data mnist --data-dir OUT --out OUT", "no MNIST in"),
        ("train --model lenet --out OUT", "unknown model 'lenet'"),
        ("train --data moons --model lenet5 --out OUT", "lenet5 reads images"),
        ("train --data moons --epochs 3 --estimator magic --out OUT", "estimator='magic'"),
        ("train --data moons --epochs 3 --gates row --out OUT", "gates='row'"),
        ("train --data moons --epochs 3 --cost flops --out OUT", "cost='flops'"),
        ("train --data moons --epochs 3 --k -1 --out OUT", "k=-1"),
        ("train --data moons --epochs 3 --start 0 --growth --out OUT", "start=0"),
        ("train --data moons --epochs 0 --dense --out OUT", "epochs=0"),
        ("report OUT", "not a finished run"),
        ("export OUT/nope --model mlp:4 --input 1,100 --out OUT/x.pt2", "nope"),
        ("export OUT/nope --model mlp:4 --input x --out OUT/x.pt2", "1,3,224,224"),
        ("export OUT/nope --model mlp:4 --out OUT/x.pt2", "nope"),
        ("export OUT/nope --model mlp:4 --data digits --input 1,64 --out OUT/x.pt2", "leave out --input"),
        ("inspect :f", "':f'"),
        ("inspect plasticnet.apps.models:LeNet5", "--input 1,3,224,224"),
        ("train --data moons --epochs 2 --out OUT", "epochs=2"),
        ("train --data moons --epochs 3 --batch 0 --out OUT", "batch=0"),
        ("train --data moons --epochs 3 --lr -1 --out OUT", "lr=-1"),
        ("train --data moons --epochs 3 --budget macs --out OUT", "macs=0.3"),
        ("train --data moons --epochs 3 --budget flops=0.3 --out OUT", "params, units or latency_ms"),
        ("train --data moons --model mlp --epochs 9 --budget macs=0.5 --out OUT", "macs=0.5: .*mlp has no widths"),
        ("train --data moons --epochs 3 --price -1 --out OUT", "price=-1.0: it must be a number, 0 or more$"),
        ("shrink mlp:4-4 --data moons --budget macs=0.5 --weights OUT/no.pt --out OUT", "there is no such file$"),
        ("train --data moons --epochs 3 --budget macs=-1 --out OUT", "above 0"),
        ("train --data moons --epochs 3 --budget params=2 --out OUT", "cannot be met"),
    ],
)  # fmt: skip
def test_one_line_for_what_is_wrong(
    args: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fail(monkeypatch, capsys, *args.replace("OUT", str(tmp_path / "out")).split())
    assert re.search(message, line)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "{}",
        "[]",
    ],
)
def test_report_of_a_damaged_run(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run.json", "summary.json", "metrics.jsonl"):
        (tmp_path / name).write_text(content)
    assert str(tmp_path) in fail(monkeypatch, capsys, "report", tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, b"{", b'{"a": 1}', b"\xff"], ids=["gone", "cut", "other", "bytes"])
def test_report_names_the_file_and_a_way_out(
    name: str, content: bytes | None, started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        (started / name).unlink()
    else:
        (started / name).write_bytes(content)
    line = fail(monkeypatch, capsys, "report", started)
    assert name in line
    assert str(started) in line
    assert "train --resume" in line
    assert not re.search(r"Expecting|Errno|codec|Error", line)
    succeed(*MOONS, "--out", started, "--resume")
    succeed("report", started)


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_report_with_damaged_settings(
    content: bytes, started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (started / "run.json").write_bytes(content)
    line = fail(monkeypatch, capsys, "report", started)
    assert line.startswith(f"plasticnet: {started / 'run.json'} ")
    assert "--overwrite" in line or "move it" in line


def test_export_of_another_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(MLP([100, 4, 2]), tmp_path / "m")
    args = ["export", tmp_path / "m", "--input", "1,100", "--out", tmp_path / "x.pt2", "--model"]
    assert "another architecture" in fail(monkeypatch, capsys, *args, "mlp:4-4")
    assert not (tmp_path / "x.pt2").exists()


@pytest.mark.parametrize(("shape", "out"), [("1,99", "x.pt2"), ("1,100", "gone/x.pt2"), ("1,100", "x.pth")])
def test_export_of_something_impossible(
    shape: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(MLP([100, 4, 2]), tmp_path / "m")
    fail(monkeypatch, capsys, "export", tmp_path / "m", "--input", shape, "--out", tmp_path / out, "--model", "mlp:4")


def test_errors_reach_python_as_they_are() -> None:
    assert isinstance(invoke("inspect", "nope").exception, PlasticError)


def test_bad_options_are_refused_by_name() -> None:
    for args in (["train", "--epochs", "many"], ["inspect"], ["nope"], ["train", "--nope", "1"]):
        assert invoke(*args).exit_code == 2


def test_python_m_plasticnet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plasticnet", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("plasticnet", run_name="__main__")
    assert not caught.value.code
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "demo", "inspect", "report", "export"))


TINY = "from torch import nn\n\ndef tiny():\n    return nn.Sequential(nn.Linear(100, 5), nn.ReLU(), nn.Linear(5, 2))\n"


def test_a_model_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the installed script runs: without the current folder on sys.path."""
    (tmp_path / "models_here.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "argv", ["plasticnet", "inspect", "models_here:tiny", "--input", "1,100", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert json.loads(capsys.readouterr().out)["sites"][0]["units"] == 5


def test_a_model_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)
    succeed("train", "--data", "moons", "--model", "my_models:tiny", "--epochs", "3",
            "--out", tmp_path / "out")  # fmt: skip
    small = load(tmp_path / "out/prune/compact.safetensors", factory("my_models:tiny", (100,), 2))
    assert isinstance(small, nn.Sequential)
