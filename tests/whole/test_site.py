"""The site: its pages are there, every link leads somewhere, every public name is in the reference, and it builds."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import plasticnet as pn
import plasticnet.hub

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HOOK = runpy.run_path(str(ROOT / "release" / "pages.py"))
LEFT_OUT: set[str] = set()  # pages of docs/ that are no part of the site on purpose
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
REFERENCE = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))


def settings() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def navigation(entry: Any) -> list[str]:
    """The pages that an entry of the navigation names, in their order."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in navigation(part)]


def anchors(page: Path) -> list[str]:
    """The anchors of the headings of a page, each as often as it has one."""
    found = list[str]()

    def note(part: str) -> str:
        titles = re.findall(r"^#+ (.+)$", part, re.MULTILINE)
        found.extend(HOOK["anchor"](re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)) for title in titles)
        return part

    HOOK["outside_code"](page.read_text(), note)
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    named = navigation(settings()["nav"])
    assert len(named) == len(set(named))
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | set(HOOK["PAGES"].values())
    assert set(named) == there - LEFT_OUT
    assert there >= LEFT_OUT
    assert all((ROOT / path).is_file() for path in HOOK["PAGES"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, name in HOOK["links"](page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        assert target.is_relative_to(ROOT), f"{page.name} links out of the repository: {path}"
        if name:
            assert target.suffix == ".md", f"{page.name} links to #{name} of {path}, which is no page"
            assert anchors(target).count(name) == 1, f"{page.name} links to {path}#{name}: not one heading of this name"


def test_links_in_code_are_none() -> None:
    text = '[a](b.md#c)\n\n```python\n[x](y)\n```\n\n[d](https://e.org) [f](#g) [h](i.py "j")\n'
    assert HOOK["links"](text) == [("b.md", "c"), ("", "g"), ("i.py", "")]


@pytest.mark.parametrize(
    ("title", "anchor"),
    [
        ("On several GPUs, in half precision, compiled", "on-several-gpus-in-half-precision-compiled"),
        ("`Take` changes names", "take-changes-names"),
        ("What is lost: 5 % or less", "what-is-lost-5--or-less"),
        ("R² and under_scores", "r²-and-under_scores"),
    ],
)
def test_anchors_are_those_of_github(title: str, anchor: str) -> None:
    assert HOOK["anchor"](title) == anchor


def test_every_cell_of_the_support_matrix_names_a_test() -> None:
    text = (DOCS / "support.md").read_text()
    cells = re.findall(r"\[[^\]]*\]\((\.\./tests/[^\s)]*)(?:\s+\"(test_\w+)\")?\)", text)
    assert len(cells) > 50
    for path, name in cells:
        assert re.search(rf"^def {name}\(", (DOCS / path).read_text(), re.MULTILINE), f"{path} has no {name}"
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):  # what a cell says, it says with a link
        for cell in row.strip("|").split("|")[1:]:
            assert (
                not re.search(r"works|refused|frozen|follows", re.sub(r"\[[^\]]*\]\([^)]*\)", "", cell))
                or "works or not" in cell
            )


def test_every_public_name_is_in_the_reference_once() -> None:
    named = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
    assert len(named) == len(set(named))
    public = {f"plasticnet.{name}" for name in pn.__all__} - {"plasticnet.__version__"}  # which index.md names
    assert {name for name in named if name.count(".") == 1} == public
    for name in named:
        module, _, last = name.rpartition(".")
        source = ROOT / "src" / module.replace(".", "/")
        files = [source.with_suffix(".py")] if source.with_suffix(".py").exists() else sorted(source.glob("*.py"))
        assert name in public or any(re.search(rf"^(class|def) {last}\b", f.read_text(), re.M) for f in files), name
    hub = [n for n, v in vars(plasticnet.hub).items() if getattr(v, "__module__", "") == "plasticnet.hub"]
    assert {f"plasticnet.hub.{n}" for n in hub if not n.startswith("_")} <= set(named)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        if find_spec(package.partition(".")[0]) is None:
            pytest.skip(f"{package} is not installed: see `make docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert "reference/training.html" in pages
    assert 'id="plasticnet.PlasticNet"' in pages["reference/training.html"]
    assert (tmp_path / "moons.gif").stat().st_size == (DOCS / "moons.gif").stat().st_size
    for name, text in pages.items():  # a reader needs no network: no scripts, styles, fonts or pictures of others
        found = re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\s>]*", text)
        assert not found, f"{name}: {found}"
