"""What the commands print on: streams of any encoding."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plasticnet.apps.cli import main

DENSE = ["train", "--dense", "--model", "mlp:4", "--epochs", "3"]
ENCODINGS = ["ascii", "cp1252", "latin-1"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A regression, of which a line is said with a sign that ASCII does not have."""
    path = tmp_path / "table.csv"
    path.write_text("a,t\n" + "".join(f"{i},{i * 0.37 % 5}\n" for i in range(60)))
    return path


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
        args = [*args, "--out", str(tmp_path / "out.csv")] if args[0] == "predict" else args
        monkeypatch.setattr(sys, "argv", ["plasticnet", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
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
