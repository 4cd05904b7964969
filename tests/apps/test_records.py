"""What summary.json and metrics.jsonl hold: a folder of somebody else is read strictly, and its report runs nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plasticnet import PlasticError
from plasticnet.apps.records import read_records
from tests.kit.commands import fail, succeed

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("records") / "run"
    succeed("train", "--data", "moons", "--model", "mlp:6-4", "--epochs", "3", "--batch", "100", "--out", out)
    return out


@pytest.fixture
def started(tmp_path: Path, run: Path) -> Path:
    """A copy of a finished run, which a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def whole_of(content: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every value in plain data, from the keys and the places that lead to it."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *rest) for rest in whole_of(value))


def put(content: Any, way: tuple[Any, ...], value: Any) -> None:
    for key in way[:-1]:
        content = content[key]
    content[way[-1]] = value


@pytest.mark.parametrize(
    ("value", "shown"),
    [(EVIL, False), ([EVIL], False), ({EVIL: 1}, False), (10**400, False), (None, False), (-1, True)],
    ids=["script", "list", "dict", "digits", "none", "minus"],
)
def test_records_of_somebody_else_are_read_strictly(value: Any, shown: bool, started: Path) -> None:
    """No value of summary.json or metrics.jsonl may be of another kind; what a report does not show is left out."""
    refused: list[str] = []
    for name in ("summary.json", "metrics.jsonl"):
        path = started / name
        sound = path.read_text()
        first, *rest = sound.splitlines(keepends=True) if name == "metrics.jsonl" else [sound]
        assert read_records(started, "")
        for way in list(whole_of(json.loads(first))):
            content = json.loads(first)
            put(content, way, value)
            path.write_text(json.dumps(content) + "\n" + "".join(rest))
            try:
                found = read_records(started, "a way out")
            except PlasticError as error:
                refused.append(str(error))
            else:  # a name, of which there may be any, or nothing that is shown
                assert shown or EVIL not in json.dumps(found) or way[-1] in ("name", "device", "units")
        path.write_text(sound)
    assert len(refused) > 30
    for line in refused:
        assert re.match(rf"{re.escape(str(started))}\S* is damaged: .*: a way out", line)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_nothing_of_somebody_else_is_run_by_a_report(name: str, started: Path) -> None:
    """The keys are names: of networks, which are known, and of sites and modules, which are escaped."""
    path = started / name
    path.write_text(path.read_text().replace('"name": "', f'"name": "{EVIL}').replace('"1"', f'"{EVIL}"'))
    succeed("report", started)
    succeed("report", started, "--out", started / "page.html")
    for page in ("report.html", "page.html"):
        assert "<script" not in (started / page).read_text()


def test_a_network_of_another_name_is_refused(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("summary.json", "metrics.jsonl"):
        path = started / name
        sound = path.read_text()
        path.write_text(sound.replace('"prune"', json.dumps(EVIL)))
        line = fail(monkeypatch, capsys, "report", started)
        assert f"{path} is damaged" in line
        assert "must be one of dense, prune, grow" in line
        path.write_text(sound)
