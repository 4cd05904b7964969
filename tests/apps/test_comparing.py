"""The page that compares runs: what it says, that nothing in it escapes, and how it looks in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from plasticnet.apps.comparing import Entry, compare
from plasticnet.apps.page import joined, markup, page, table, text
from tests.kit.commands import fail, succeed

VOID = {"meta", "path", "br"}
MOONS = ["train", "--data", "moons", "--model", "mlp:6-4", "--epochs", "3", "--batch", "100"]
ALL, ONE = ("--compare",), ()  # three networks in a folder, and one


class Parsed(HTMLParser):
    """The tags and the text of a page; it complains where tags are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def labels(self) -> list[str]:
        return [str(attrs["aria-label"]) for tag, attrs in self.tags if tag == "svg" and "aria-label" in attrs]


def entry(name: str = "run", epochs: int = 4, sites: int = 2, **changed: Any) -> Entry:
    history = [
        {
            "run": "prune", "epoch": e, "k": 7.0, "val_loss": 1 / e, "val_score": 0.5 + e / 100,
            "units": {f"layer.{i}": max(1, 40 // e) for i in range(sites)}, "parameters": 10_000 // e, "macs": 900 // e,
        }
        for e in range(1, epochs + 1)
    ]  # fmt: skip
    result = {
        "task": "classification", "score": "accuracy", "test_score": 0.9312,
        "units": {f"layer.{i}": 10 for i in range(sites)}, "parameters": 2500, "macs": 225,
        "ms_per_1000": 1.25, "train_cpu_seconds": 12.34,
    }  # fmt: skip
    return Entry(name, "moons", "mlp:6-4", {**result, **changed}, history)


def test_table_curves_and_a_picture_for_every_site() -> None:
    found = Parsed(compare([entry("first"), entry("second", epochs=2, sites=3)]))
    assert {"93.12 %", "10-10", "10-10-10", "2,500", "225", "1.25", "12.3"} <= set(found.texts)
    labels = found.labels()
    assert labels[:4] == [f"{what} by epoch" for what in ("validation loss", "validation accuracy", "parameters",
                                                          "multiply-adds")]  # fmt: skip
    assert labels[4:] == [
        "layer.0: 40 to 10 open units in 4 epochs", "layer.1: 40 to 10 open units in 4 epochs",
        *(f"layer.{i}: 40 to 20 open units in 2 epochs" for i in range(3)),
    ]  # fmt: skip
    assert "first: 0.25 after epoch 4" in found.texts
    bars = [str(attrs["d"]).count("M") for tag, attrs in found.tags if tag == "path" and "fill" in attrs]
    assert bars[-5:] == [4, 4, 2, 2, 2]


def test_every_number_of_a_picture_lies_within_it() -> None:
    text = compare([entry("a", epochs=1), entry("b", epochs=30), entry("c", epochs=9, sites=1)])
    for d in re.findall(r'<path(?: class="grid")? d="([^"]*)"', text):
        assert re.fullmatch(r"[MLHVhz\d. -]+", d)
    for d in re.findall(r'd="(M[\d. L]+)" fill="none"', text):
        for x, y in (pair.split() for pair in d[1:].split("L")):
            assert 0 <= float(x) <= 360
            assert 0 <= float(y) <= 200


def test_everything_is_escaped() -> None:
    evil = "</title><script>alert('1')</script>\" onload=\"x"
    bad = entry(evil)
    history = [{**record, "units": {evil: 3}} for record in bad.history]
    text = compare([Entry(evil, evil, evil, {**bad.result, "score": evil}, history)])
    found = Parsed(text)
    assert "script" not in {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert "".join(found.texts).count(evil) >= 5


def test_markup_escapes_whatever_is_filled_in_but_markup() -> None:
    """Also in a format, from an object, and as a part; and markup is not escaped twice."""
    evil = "<i>&\"'"
    safe = "&lt;i&gt;&amp;&quot;&#x27;"
    assert markup("<b>{}</b>{:>9}{x!s}", evil, evil, x=[evil]) == f"<b>{safe}</b>   {safe}[{text(repr(evil))}]"
    assert joined([evil, markup("<b>{}</b>", evil)]) == f"{safe}<b>{safe}</b>"
    assert markup("{}{:,}", markup("<b>{}</b>", evil), 1234567) == f"<b>{safe}</b>1,234,567"
    assert evil not in page(evil, text(evil))


def test_nothing_is_loaded() -> None:
    found = Parsed(compare([entry()]))
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "use", "image"})
    assert not any(name in ("src", "href", "action", "data") for _, attrs in found.tags for name in attrs)
    text = compare([entry()])
    assert "url(" not in text
    assert "@import" not in text


def test_scores_of_both_kinds() -> None:
    """Networks that tell classes apart have accuracies, and those that predict numbers have R²."""
    plain = entry("classes")
    number = entry("numbers", task="regression", score="R²", test_score=0.75)
    history = [{**r, "val_score": 0.5} for r in number.history]
    found = Parsed(compare([plain, Entry("numbers", "x", "y", number.result, history)]))
    assert {"93.12 %", "R² 0.7500"} <= set(found.texts)
    assert {"validation accuracy by epoch", "validation R² by epoch"} <= set(found.labels())
    assert "numbers: 0.5 after epoch 4" in found.texts


def test_what_is_missing_or_not_finite_is_left_out() -> None:
    whole = entry()
    history = [{**r, "val_loss": v} for r, v in zip(whole.history, (math.nan, None, 0.5, math.inf), strict=True)]
    found = Parsed(compare([Entry("a", "x", "y", whole.result, history)]))
    assert "a: 0.5 after epoch 3" in found.texts
    none = [{k: v for k, v in r.items() if k != "val_loss"} for r in whole.history]
    assert "validation loss: not recorded" in Parsed(compare([Entry("a", "x", "y", whole.result, none)])).texts


def test_many_networks_and_many_sites() -> None:
    found = Parsed(compare([entry(f"run {i}", sites=70 if i == 0 else 1) for i in range(12)]))
    assert "and 10 more sites" in found.texts
    strokes = [(a["stroke"], a.get("stroke-dasharray")) for t, a in found.tags if t == "path" and "stroke" in a]
    assert len(set(strokes)) == 12  # no two networks have the same line


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compared")
    succeed(*MOONS, *ALL, "--out", folder / "one")
    succeed(*MOONS, *ONE, "--seed", "1", "--out", folder / "two")
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_runs_are_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert f"written {out}" in succeed("report", *runs, "--out", out)
    found = Parsed(out.read_text())
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert {*(f"one, {mode}" for mode in summary), "two"} <= set(found.texts)
    assert {f"{s['parameters']:,}" for s in summary.values()} <= set(found.texts)
    before = out.read_bytes()
    succeed("report", *runs, "--out", out)  # a page of ours is replaced
    assert out.read_bytes() == before


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.html"
    own.write_text("<p>mine</p>")
    assert "--out page.html" in fail(monkeypatch, capsys, "report", *runs)
    assert "would be replaced" in fail(monkeypatch, capsys, "report", *runs, "--out", own)
    assert own.read_text() == "<p>mine</p>"
    assert "named twice" in fail(monkeypatch, capsys, "report", runs[0], runs[0], "--out", tmp_path / "page.html")
    assert "not a finished run" in fail(monkeypatch, capsys, "report", runs[0], tmp_path, "--out", tmp_path / "p.html")
    broken = shutil.copytree(runs[1], tmp_path / "broken")
    (broken / "summary.json").write_text('{"prune": {"mode": "prune"}}')
    line = fail(monkeypatch, capsys, "report", runs[0], broken, "--out", tmp_path / "p.html")
    assert f"{broken / 'summary.json'} is damaged" in line
    assert not (tmp_path / "p.html").exists()
    missing = tmp_path / "no folder" / "p.html"
    assert f"{missing} cannot be written" in fail(monkeypatch, capsys, "report", *runs, "--out", missing)
    assert "would be replaced" in fail(monkeypatch, capsys, "report", *runs, "--out", tmp_path)


# -- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        own = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            found = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser starts: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("what", ["comparison", "report", "demo"])
def test_in_a_browser(
    what: str, width: int, scheme: str, runs: tuple[Path, Path], browser: Any, tmp_path: Path
) -> None:
    """Nothing is wider than the screen, texts are legible, and the console is silent."""
    if what == "report":
        path = runs[0] / "report.html"
    elif what == "demo":
        succeed("demo", "--out", tmp_path)
        path = tmp_path / "demo.html"
    else:
        path = tmp_path / "page.html"
        long = entry("a_very_long_name_of_a_run_without_any_space_in_it" * 3, epochs=300, sites=12)
        path.write_text(compare([entry("short"), long]))
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
    tab.goto(path.as_uri())
    for summary in tab.query_selector_all("summary"):
        summary.click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert not said
    ink, paper = (
        tab.evaluate(f"getComputedStyle(document.body).{name}.match(/[0-9]+/g).slice(0, 3).map(Number)")
        for name in ("color", "backgroundColor")
    )
    assert (sum(paper) < 200) == (scheme == "dark")
    assert abs(sum(ink) - sum(paper)) > 400
    context.close()


def test_a_table_without_a_head_and_a_page_of_its_own() -> None:
    found = Parsed(page("a < b", table((), [("x & y", 1)])))
    assert {"a < b", "x & y", "1"} <= set(found.texts)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
