"""prepared.json: what does not fit together is refused, and so are numbers that a table cannot hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from plasticnet import PlasticError
from plasticnet.apps.loading import load_any
from plasticnet.apps.own_data import Reading
from plasticnet.apps.prepared import read_prepared
from tests.kit.commands import fail, succeed


def written(path: Path, cells: list[str], targets: list[Any] | None = None) -> Path:
    targets = [i % 3 for i in range(len(cells))] if targets is None else targets
    path.write_text("a,b,t\n" + "".join(f"{c},{i},{t}\n" for i, (c, t) in enumerate(zip(cells, targets, strict=True))))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("prepared")
    table = written(folder / "table.csv", [f"{i}.5" for i in range(60)])
    succeed("train", "--data", table, "--target", "t", "--dense", "--model", "mlp:4", "--epochs", "3", "--out", folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": {"numbers": [], "categories": []}}, "its table has no columns"),
        ({"outputs": 1e9}, "outputs is 1000000000.0, and must be a whole number"),
        ({"outputs": 10**9}, "3 labels do not fit 1000000000 outputs"),
        ({"outputs": 10**30}, "outputs is a number with 31 digits"),
        ({"outputs": -1}, "the size -1: it must be 1 or more"),
        ({"shape": [0]}, "the size 0: it must be 1 or more"),
        ({"target.task": "regression"}, "a regression does not have 3 outputs and 3 labels"),
        ({"target.task": "regression", "outputs": 1}, "a regression does not have 1 outputs and 3 labels"),
        ({"target.labels": [], "outputs": 1}, "a classification does not have 1 outputs"),
        ({"target.labels": ["a"]}, "1 labels do not fit 3 outputs"),
        ({"target.deviation": 0}, "the deviation 0 of the target cannot be"),
        ({"target.mean": 10**400}, "target.mean is a number with 401 digits"),
        ({"table.numbers.0.deviation": 0}, "the deviation 0 of 'a' cannot be"),
        ({"table.numbers.0.mean": float("inf")}, "the mean inf and the deviation"),
    ],
    ids=range(14),
)
def test_what_cannot_be_is_refused(
    change: dict[str, Any], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_prepared(run, "predict").outputs == 3
    path = run / "prepared.json"
    content = json.loads(path.read_text())
    for way, value in change.items():
        *parents, last = (int(key) if key.isdigit() else key for key in way.split("."))
        inner = content
        for key in parents:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(content))
    line = fail(monkeypatch, capsys, "predict", run, "--data", run / "table.csv", "--out", run / "out.csv")
    assert f"{path} is damaged: " in line
    assert message in line
    assert not (run / "out.csv").exists()


def test_predictions_for_a_number_that_is_too_large(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(run / "new.csv", ["1.5", "1e300", "2.5"])
    line = fail(monkeypatch, capsys, "predict", run, "--data", data, "--out", run / "out.csv")
    assert "the column 'a' holds 1e+300 in row 2, which is too large" in line
    assert not (run / "out.csv").exists()


@pytest.mark.parametrize("large", ["1e308", "-1e308", "1e200"])
def test_a_column_that_is_too_large_to_be_normalised(large: str, tmp_path: Path) -> None:
    cells = [f"{i}.5" if i % 2 else large for i in range(60)]
    with pytest.raises(PlasticError, match=r"the column 'a' holds -?1e\+\d+, too large a number.*--ignore a"):
        load_any(str(written(tmp_path / "d.csv", cells)), Reading(target="t"), 0)


def test_a_target_that_is_too_large_to_be_normalised(tmp_path: Path) -> None:
    data = written(tmp_path / "d.csv", ["1"] * 60, [f"{i}.5" if i % 2 else "1e200" for i in range(60)])
    with pytest.raises(PlasticError, match=r"the target 't' holds 1e\+200, which is too large"):
        load_any(str(data), Reading(target="t"), 0)


def test_data_that_lie_where_the_run_began(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**config, "data": "table.csv"}))
    monkeypatch.chdir(tmp_path)
    line = fail(monkeypatch, capsys, "train", "--resume", "--out", run)
    assert "the path is relative to the folder in which the run began: call the command there" in line


def test_a_pipe_or_a_folder_in_the_place_of_the_records(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    assert f"{path} cannot be written" in (line := fail(monkeypatch, capsys, "train", "--resume", "--out", run))
    assert "remove it" in line
