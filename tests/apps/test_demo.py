"""The demo: what it promises of its two networks, what its page shows, and what it never replaces."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import plasticnet as pn
from plasticnet.apps.data import load_data
from plasticnet.apps.models import factory
from plasticnet.apps.scores import evaluate
from tests.kit.commands import fail, succeed

FILES = {"demo.json", "demo.html", "small.safetensors", "grown.safetensors"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo, and what was printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, succeed("demo", "--out", folder)


@pytest.mark.slow
def test_a_tenth_of_the_multiply_adds_at_once(finished: tuple[Path, str]) -> None:
    record = json.loads((finished[0] / "demo.json").read_text())["shrunk"]
    whole, cut, repaired = record["accuracies"]
    assert [step["name"] for step in record["steps"]] == ["whole", "cut", "repaired"]  # there is no epoch of training
    assert record["steps"][-1]["macs"] <= 0.1 * record["steps"][0]["macs"]
    assert whole > 0.94
    assert cut < 0.9 < repaired
    assert whole - repaired < 0.03


@pytest.mark.slow
def test_growth_has_hardly_a_peak(finished: tuple[Path, str]) -> None:
    record = json.loads((finished[0] / "demo.json").read_text())["grown"]
    assert record["widths"][0] == [3, 3]
    assert all(width > 6 for width in record["widths"][-1])
    assert record["peak"] == max(record["parameters"]) / record["parameters"][-1]
    assert record["peak"] < 1.15
    assert record["accuracy"] > 0.93


@pytest.mark.slow
def test_the_networks_are_those_of_the_page(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    record = json.loads((folder / "demo.json").read_text())
    data = load_data("digits")
    make = factory("mlp:256-128", data.shape, data.outputs)
    page = (folder / "demo.html").read_text()
    for file, right in (
        ("small.safetensors", record["shrunk"]["accuracies"][-1]),
        ("grown.safetensors", record["grown"]["accuracy"]),
    ):
        network = pn.load(folder / file, make)
        assert evaluate(network, data.test).score == pytest.approx(right, abs=0.005)
        parameters = f"{sum(p.numel() for p in network.parameters()):,}"
        for text in (page, printed):
            assert parameters in text
            assert f"{right:.1%}" in text


@pytest.mark.slow
def test_the_page_begins_with_what_was_done(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "demo.html").read_text()
    assert page.index("was cut to 10% of its multiply-adds") < page.index("grew by itself") < page.index("<svg")
    pictures = re.findall(r"<figcaption>([^<]+)</figcaption><svg", page)
    assert len(pictures) == 5
    assert all(len(title.split()) >= 4 for title in pictures)
    assert page.count('aria-label="a handwritten') == 9
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert not re.findall(r"(?:src|href)=", page)


@pytest.mark.slow
def test_a_demo_is_replaced_and_nothing_else(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished[0]
    assert {path.name for path in folder.iterdir()} == FILES
    (folder / "notes.txt").write_text("mine")
    (folder / "demo.html").write_text("left of a demo that was interrupted")
    succeed("demo", "--out", folder)
    assert (folder / "demo.html").read_text().startswith("<!doctype html>")
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "demo.json").write_text('{"my own": 1}')
    assert "--overwrite" in fail(monkeypatch, capsys, "demo", "--out", folder)
    assert (folder / "demo.json").read_text() == '{"my own": 1}'


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_others_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    line = fail(monkeypatch, capsys, "demo", "--out", tmp_path)
    assert name in line
    assert "--overwrite" in line
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in fail(monkeypatch, capsys, "demo", "--out", tmp_path / "file" / "below")


@pytest.fixture(autouse=True)
def threads() -> None:
    """The command sets the number of threads for its process, which here is that of other tests, too."""
    torch.set_num_threads(1)
