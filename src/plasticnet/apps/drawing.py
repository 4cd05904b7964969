"""Draws small pictures as SVG text: curves and bars, in the colours of a page and as wide as they can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plasticnet.apps.page import Markup, joined, markup

COLOURS = 8  # how many colours the page has; further lines have them again, and are dashed
_WIDTH, _HEIGHT = 360, 200  # of a picture of curves
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 10, 22  # the margins, which hold the numbers at the axes
_ROW = 42  # how high a bar and the words above it are

STYLE = """
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
.key svg { width: 1.6rem; height: .8rem; margin-right: .4rem; }
.pictures { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.pictures figure { margin: 0; min-width: 0; } .pictures svg { width: 100%; background: none; }
.axis { fill: var(--faint); font-size: 12px; } .grid { stroke: var(--line); stroke-width: 1; }
.word { fill: var(--ink); font-size: 14px; }
"""


@dataclass(frozen=True)
class Line:
    """A line in a picture of curves.

    Attributes:
        name: What a reader who points at it is told.
        points: The epochs and the values; a line without any is not drawn, and keeps its colour.
    """

    name: str
    points: Sequence[tuple[int, float]]


def key(names: Sequence[str]) -> Markup:
    """Return a list that says which line is which."""
    entries = joined(markup("<li>{}{}</li>", _sample(i), name) for i, name in enumerate(names))
    return markup('<ul class="key">{}</ul>', entries)


def curves(title: str, lines: Sequence[Line], *, log: bool = False, level: float | None = None) -> Markup:
    """Return a picture of lines over the epochs.

    Args:
        title: What is drawn.
        lines: The lines.
        log: Whether the axis of values is logarithmic. Otherwise it begins at the smallest value.
        level: A value at which a dashed line lies, or None.
    """
    series = [[(x, y) for x, y in line.points if not log or y > 0] for line in lines]
    values = [y for points in series for _, y in points]
    if not values:
        return markup("<figure><figcaption>{}: not recorded</figcaption></figure>", title)
    first, last = (end(x for points in series for x, _ in points) for end in (min, max))
    low, high = min(values), max(values)

    def place(value: float) -> float:
        a, b, v = (math.log(low), math.log(high), math.log(value)) if log else (low, high, value)
        share = (v - a) / (b - a) if b > a else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def across(epoch: int) -> float:
        share = (epoch - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    middle = math.sqrt(low * high) if log else (low + high) / 2
    if all(isinstance(value, int) for value in values):
        middle = round(middle)
    grid = [
        markup(
            '<path class="grid" d="M{} {:.1f}H{}"/><text class="axis" x="{}" y="{:.1f}" text-anchor="end">{}</text>',
            _LEFT, place(v), _WIDTH - _RIGHT, _LEFT - 4, place(v) + 4, short(v),
        )
        for v in sorted({low, middle, high})
    ]  # fmt: skip
    if level is not None:
        dashed = '<path d="M{} {:.1f}H{}" fill="none" stroke="var(--faint)" stroke-dasharray="5 3"/>'
        grid.append(markup(dashed, _LEFT, place(level), _WIDTH - _RIGHT))
    axis = [
        markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="{}">{}</text>', across(x), _HEIGHT - 6, anchor, word)
        for x, (anchor, word) in {first: ("start", f"epoch {first}"), last: ("end", str(last))}.items()
    ]
    drawn = [
        markup(
            '<path d="M{}" {}><title>{}: {} after epoch {}</title></path>',
            "L".join(f"{across(x):.1f} {place(y):.1f}" for x, y in points), _stroke(i), line.name,
            short(points[-1][1]), points[-1][0],
        )
        for i, (line, points) in enumerate(zip(lines, series, strict=True))
        if points
    ]  # fmt: skip
    return _figure(title, f"{title} by epoch", _HEIGHT, joined([*grid, *axis, *drawn]))


def bars(title: str, rows: Sequence[tuple[str, float, str]], most: float, colours: Sequence[int]) -> Markup:
    """Return a picture of bars that lie below each other, each with words above it.

    Args:
        title: What is drawn.
        rows: For each bar the words, the value, and the value as text.
        most: The value whose bar is as long as the picture is wide.
        colours: For each bar the number of its colour.
    """
    drawn = joined(
        markup(
            '<text class="word" x="0" y="{y}">{words}</text>'
            '<text class="word" x="{width}" y="{y}" text-anchor="end">{shown}</text>'
            '<path class="grid" d="M0 {middle}H{width}"/>'
            '<path d="M0 {top}h{length:.1f}v12H0z" fill="var(--c{colour})"/>',
            y=_ROW * i + 15, middle=_ROW * i + 27, top=_ROW * i + 21, width=_WIDTH, length=_WIDTH * value / most,
            words=words, shown=shown, colour=colour,
        )
        for i, ((words, value, shown), colour) in enumerate(zip(rows, colours, strict=True))
    )  # fmt: skip
    label = f"{title}: {', '.join(f'{words} {shown}' for words, _, shown in rows)}"
    return _figure(title, label, _ROW * len(rows), drawn)


def short(value: float) -> str:
    """Return a number in a few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _figure(title: str, label: str, height: int, drawn: Markup) -> Markup:
    """Return a figure with its title above the picture."""
    return markup(
        '<figure><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>',
        title, _WIDTH, height, label, drawn,
    )  # fmt: skip


def _stroke(index: int) -> Markup:
    """Return the attributes of a line."""
    dashes = markup(' stroke-dasharray="{} 3"', 2 + 3 * (index // COLOURS)) if index >= COLOURS else ""
    return markup('fill="none" stroke="var(--c{})" stroke-width="1.6"{}', index % COLOURS, dashes)


def _sample(index: int) -> Markup:
    """Return the picture of a line for the key."""
    return markup('<svg viewBox="0 0 32 16" aria-hidden="true"><path d="M0 8H32" {}/></svg>', _stroke(index))
