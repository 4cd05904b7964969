"""The command line, called as a user calls it."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner, Result

from plasticnet.apps.cli import app, main


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def succeed(*args: object) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that `main` prints before it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["plasticnet", *map(str, args)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plasticnet: ")
    return line
