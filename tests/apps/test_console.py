"""What the commands print on: streams of any encoding."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from plasticnet.apps.cli import main
from tests.kit.commands import fail

DENSE = ["train", "--dense", "--model", "mlp:4", "--epochs", "3"]
ENCODINGS = ["ascii", "cp1252", "latin-1"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A regression, of which a line is said with a sign that ASCII does not have."""
    path = tmp_path / "table.csv"
    path.write_text("a,t\n" + "".join(f"{i},{i * 0.37 % 5}\n" for i in range(60)))
    return path


def called(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    """Calls the command line as the program does, on the streams that there are."""
    monkeypatch.setattr(sys, "argv", ["plasticnet", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_letters_that_the_output_does_not_have(
    encoding: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The k of ordinary training is infinite, and the deviation of the target stands behind its mean."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = [*DENSE, "--data", str(table), "--target", "t", "--out", str(tmp_path / "run")]
    for args in (command, [*command, "--resume"], ["predict", str(tmp_path / "run"), "--data", str(table)]):
        called(monkeypatch, *args, *(["--out", tmp_path / "out.csv"] if args[0] == "predict" else []))
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert r"\u221e" in text
    assert ("±" if encoding != "ascii" else r"\xb1") in text


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS[:2])
def test_a_program_whose_output_is_not_utf_8(encoding: str, table: Path, tmp_path: Path) -> None:
    command = [*DENSE, "--data", str(table), "--target", "t", "--out", str(tmp_path / "run")]
    for more in ([], ["--resume"]):
        found = subprocess.run(
            [sys.executable, "-m", "plasticnet", *command, *more],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert (found.returncode, found.stderr) == (0, b"")
        assert rb"\u221e" in found.stdout


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="there are no such devices and names")


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize(
    "args", [["inspect", "lenet5"], ["train", "--data", "moons", *DENSE[1:]]], ids=["short", "long"]
)
def test_an_output_that_is_full_or_that_nobody_reads(args: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "plasticnet", *args]
    with open("/dev/full", "wb") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path)
    assert found.returncode == 2
    (line,) = found.stderr.decode().splitlines()
    assert line.startswith("plasticnet: ")
    assert "No space left on device" in line
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as unread:
        found = subprocess.run([*command, *(["--overwrite"] if args[0] == "train" else [])], stdout=unread,
                               stderr=subprocess.PIPE, cwd=tmp_path)  # fmt: skip
    assert (found.returncode, found.stderr) == (1, b"")


LONG = "q" * 300
STRANGE = os.fsdecode(b"d\xff.csv")
TRAIN = ["train", "--data", "moons", "--epochs", "3"]


@POSIX
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--data", LONG], "too long"),
        (["train", "--data", f"{LONG}.csv"], "too long"),
        ([*TRAIN, "--out", LONG], "too long"),
        (["predict", LONG, "--data", "x.csv"], "too long"),
        (["predict", "run", "--data", "x.csv", "--out", f"{LONG}.csv"], "too long"),
        (["report", LONG], "too long"),
        (["report", "run", "--out", LONG], "too long"),
        (["train", "--config", LONG], "too long"),
        (["train", "--data", STRANGE, "--target", "t"], r"d\\udcff.csv: the name is not UTF-8"),
        ([*TRAIN, "--seed", "9" * 20], "seed=9+: it must be a whole number with 64 bits"),
        ([*TRAIN, "--batch", "9" * 20], "batch=9+: it must be 2,147,483,647 or less"),
        ([*TRAIN, "--start", "9" * 20], "start=9+: it must be"),
        ([*TRAIN, "--start", str(2**31 - 1)], "model 'mlp:2147483647-2147483647'"),
        ([*TRAIN[:-1], "9" * 20], "epochs=9+: it must be"),
        ([*TRAIN, "--model", f"mlp:{'9' * 14}"], "model 'mlp:9+'"),
        ([*TRAIN, "--model", f"mlp:{'9' * 25}"], "model 'mlp:9+'"),
        (["shrink", "mlp:4", "--data", "moons", "--budget", "macs=0.5", "--seed", "9" * 20], "--seed 9+: it must be"),
        (["shrink", "mlp:4", "--data", "moons", "--budget", "macs=0.5", "--batch", "9" * 20], "--batch 9+: it must be"),
    ],
    ids=range(18),
)
def test_names_and_numbers_that_no_system_takes(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / STRANGE).write_text("a,t\n" + "".join(f"{i},{i % 2}\n" for i in range(60)))
    before = sorted(tmp_path.iterdir())
    line = fail(monkeypatch, capsys, *args)
    assert re.search(message, line)
    assert len(line) < 1000
    assert sorted(tmp_path.iterdir()) == before


@POSIX
def test_names_that_are_not_utf_8(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page shows the name of a folder that was renamed; what a run would have to hold or to read is refused."""
    strange, page = tmp_path / os.fsdecode(b"run\xff"), tmp_path / "page.html"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    called(monkeypatch, *DENSE, "--data", table, "--target", "t", "--out", tmp_path / "run")
    predict = ["--data", table.rename(tmp_path / STRANGE), "--out", tmp_path / "predictions.csv"]
    called(monkeypatch, "predict", tmp_path / "run", *predict)
    (tmp_path / "run").rename(strange)
    called(monkeypatch, "report", strange, "--out", page)
    assert "its name is not UTF-8: rename it" in fail(monkeypatch, capsys, "predict", strange, *predict)
    assert "the name is not UTF-8" in fail(monkeypatch, capsys, *TRAIN, "--out", tmp_path / f"{STRANGE}2")
    assert r"run\udcff" in page.read_text(encoding="utf-8")
    for name in ("a", os.fsdecode(b"b\xff")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (4, 4)).save(tmp_path / "images" / name / f"{i}.png")
    line = fail(monkeypatch, capsys, "train", "--data", tmp_path / "images", "--out", tmp_path / "none")
    assert r"the name 'b\udcff/0.png' is not UTF-8: rename it" in line
