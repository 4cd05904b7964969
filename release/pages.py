"""What the site needs beside docs/: pages of the root, files that pages link to, and the anchors that GitHub makes.

MkDocs reads one folder. The README, the changelog and the like lie beside it, and many pages link to scripts, so this
hook of mkdocs.yml adds them to the site and turns the links. In the repository all links stay relative, as GitHub and
editors follow them. Nothing here imports MkDocs until MkDocs calls it, so that the tests can read the names.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages of the root, and their names in the site. A README of docs/ would become the page of its folder.
PAGES = {
    "README.md": "the-readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()([^()\s#]*)(#[^()\s]*)?(?=\)|\s+\")")
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)


def anchor(title: str, separator: str = "-") -> str:
    """Return the anchor of a heading, as GitHub makes it: lower case, without punctuation, a dash for each space."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", separator)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Return a page in which what is not a block of code is changed."""
    parts, last = list[str](), 0
    for fence in FENCE.finditer(text):
        parts += [change(text[last : fence.start()]), fence.group()]
        last = fence.end()
    return "".join([*parts, change(text[last:])])


def links(text: str) -> list[tuple[str, str]]:
    """Return the relative links of a page outside of code: the path, which may be empty, and the anchor without #."""
    found = list[tuple[str, str]]()

    def note(part: str) -> str:
        for path, name in LINK.findall(part):
            if "://" not in path and not path.startswith("mailto:") and (path or name):
                found.append((path, name[1:]))
        return part

    outside_code(text, note)
    return found


def in_site(source: Path, target: str) -> str:
    """Return where the site has what a page links to, relative to the top of the site.

    Args:
        source: The file of the page, in the repository.
        target: The path in the link.
    """
    path = posixpath.normpath(posixpath.join(source.relative_to(ROOT).parent.as_posix(), target))
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def source_of(page: str) -> Path:
    """Return the file in the repository that a page of the site is made from."""
    names = {name: path for path, name in PAGES.items()}
    return ROOT / names[page] if page in names else DOCS / page


def on_config(config: Any) -> Any:
    """Give headings the anchors that they have on GitHub, so that one link serves both."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root, and every file outside of docs/ that a page links to."""
    from mkdocs.structure.files import File

    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    for page in [file.src_uri for file in files.documentation_pages()]:
        source = source_of(page)
        for target, _ in links(source.read_text(encoding="utf-8")):
            name = in_site(source, target) if target else ""
            original = ROOT / name.removeprefix("files/")
            if name.startswith("files/") and original.is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(original)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the relative links of a page to where the site has what they name."""
    source, here = source_of(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        path, name = match.groups()
        if not path or "://" in path or path.startswith("mailto:"):
            return match.group()
        return posixpath.relpath(in_site(source, path), here or ".") + (name or "")

    return outside_code(markdown, lambda part: LINK.sub(turned, part))
