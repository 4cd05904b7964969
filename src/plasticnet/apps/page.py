"""The frame of an HTML page: its style for light and dark, for wide and narrow screens, and its tables.

A page loads nothing from elsewhere. It is made of `Markup`, and `markup` makes that of templates, which stand in our
code, and of values, each of which it escapes unless it is markup itself. So nobody can forget to escape.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Any, LiteralString

START = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'  # a run's page is told from others by it

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --faint: #5c5c5c; --line: #ddd;
  --c0: #c0392b; --c1: #2471a3; --c2: #6b6b6b; --c3: #1e8449;
  --c4: #9a5b00; --c5: #7d3c98; --c6: #00707a; --c7: #a3316f; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e6e6e6; --faint: #a8a8a8; --line: #3a3d44;
    --c0: #ff8a7a; --c1: #74b9ff; --c2: #b5b5b5; --c3: #6fdc8c;
    --c4: #ffc46b; --c5: #d5a6f0; --c6: #67d6df; --c7: #ff9ccf; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; } table { border-collapse: collapse; overflow-wrap: normal; }
td, th { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { text-align: left; } .scroll td { white-space: nowrap; }
figure { margin: 2rem 0; } svg { max-width: 100%; height: auto; } figcaption, .faint { color: var(--faint); }
figure > svg { background: #fff; border-radius: .3rem; }
@media (max-width: 30rem) { td, th { padding: .3rem .4rem; } }
h1 { font-size: clamp(1.5rem, 5vw, 2rem); line-height: 1.25; }
details { margin: 1rem 0; overflow-x: auto; } summary { cursor: pointer; }
details table { font-size: .8rem; } details td, details th { padding: .15rem .5rem; }
th[colspan] { text-align: center; } th[colspan], details td:nth-child(3n + 2) { border-left: 1px solid var(--line); }
@media print {
  :root { color-scheme: light; } body { font-size: 10.5pt; margin: 0; max-width: none; padding: 0; }
  h1, h2, h3 { break-after: avoid; } figure, tr, dt, dd { break-inside: avoid; } svg { print-color-adjust: exact; }
  .scroll { overflow: visible; } table { font-size: 8.5pt; } td, th { padding: .2rem .4rem; }
}
"""


class Markup(str):
    """HTML that is written as it is. Plain text, and every other value, is escaped before it comes into a page."""


class _Escaping(Formatter):
    """Fills in templates, and escapes what is filled in."""

    def format_field(self, value: Any, format_spec: str) -> Markup:
        """Return a value in its format as markup."""
        return value if isinstance(value, Markup) else text(format(value, format_spec))


def markup(template: LiteralString, *values: object, **named: object) -> Markup:
    """Return a template, in which `str.format` would fill in the values, with these values escaped.

    Args:
        template: The HTML, which stands in our code.
        values: What takes the place of ``{}``.
        named: What takes the place of ``{name}``.
    """
    return Markup(_Escaping().vformat(template, values, named))


def joined(parts: Iterable[object]) -> Markup:
    """Return parts one after the other as markup."""
    return Markup("".join(map(text, parts)))


def page(title: str, body: Markup, style: str = "") -> str:
    """Return the text of a page.

    Args:
        title: The title.
        body: What is below the title.
        style: More CSS.
    """
    frame = markup(
        '{title}</title><meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style>'
        "</head><body><h1>{title}</h1>{body}</body></html>\n",
        title=title, body=body, style=Markup(_STYLE + style),
    )  # fmt: skip
    return START + frame


def text(value: object) -> Markup:
    """Return a value as markup that shows it as it is, also within the quotes of an attribute; markup stays markup.

    What cannot be written, as in the name of a file that is not UTF-8, is shown as an escape.
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(str(value)).encode(errors="backslashreplace").decode())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table, which scrolls by itself where it is wider than the screen; all of its cells are escaped.

    Args:
        head: The names of the columns; nothing for a table without a head.
        rows: The cells.
    """
    top = markup("<tr>{}</tr>", joined(markup("<th>{}</th>", c) for c in head)) if head else ""
    body = joined(markup("<tr>{}</tr>", joined(markup("<td>{}</td>", c) for c in row)) for row in rows)
    return markup('<div class="scroll" tabindex="0"><table>{}{}</table></div>', top, body)
