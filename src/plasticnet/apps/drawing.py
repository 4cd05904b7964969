"""Draws small pictures as SVG text: curves and bars, in the colours of a page and as wide as they can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plasticnet.apps.page import text

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


def key(names: Sequence[str]) -> str:
    """Return a list that says which line is which."""
    return f'<ul class="key">{"".join(f"<li>{_sample(i)}{text(name)}</li>" for i, name in enumerate(names))}</ul>'


def curves(title: str, lines: Sequence[Line], *, log: bool = False, level: float | None = None) -> str:
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
        return f"<figure><figcaption>{text(title)}: not recorded</figcaption></figure>"
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
    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {place(v):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text class="axis" x="{_LEFT - 4}" y="{place(v) + 4:.1f}" text-anchor="end">{short(v)}</text>'
        for v in sorted({low, middle, high})
    )
    if level is not None:
        grid += (
            f'<path d="M{_LEFT} {place(level):.1f}H{_WIDTH - _RIGHT}" fill="none" stroke="var(--faint)" '
            'stroke-dasharray="5 3"/>'
        )
    axis = "".join(
        f'<text class="axis" x="{across(x):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{word}</text>'
        for x, (anchor, word) in {first: ("start", f"epoch {first}"), last: ("end", str(last))}.items()
    )
    drawn = "".join(
        f'<path d="M{"L".join(f"{across(x):.1f} {place(y):.1f}" for x, y in points)}" {_stroke(i)}>'
        f"<title>{text(line.name)}: {short(points[-1][1])} after epoch {points[-1][0]}</title></path>"
        for i, (line, points) in enumerate(zip(lines, series, strict=True))
        if points
    )
    return _figure(title, f"{title} by epoch", _HEIGHT, f"{grid}{axis}{drawn}")


def bars(title: str, rows: Sequence[tuple[str, float, str]], most: float, colours: Sequence[int]) -> str:
    """Return a picture of bars that lie below each other, each with words above it.

    Args:
        title: What is drawn.
        rows: For each bar the words, the value, and the value as text.
        most: The value whose bar is as long as the picture is wide.
        colours: For each bar the number of its colour.
    """
    drawn = "".join(
        f'<text class="word" x="0" y="{_ROW * i + 15}">{text(words)}</text>'
        f'<text class="word" x="{_WIDTH}" y="{_ROW * i + 15}" text-anchor="end">{text(shown)}</text>'
        f'<path class="grid" d="M0 {_ROW * i + 27}H{_WIDTH}"/>'
        f'<path d="M0 {_ROW * i + 21}h{_WIDTH * value / most:.1f}v12H0z" fill="var(--c{colour})"/>'
        for i, ((words, value, shown), colour) in enumerate(zip(rows, colours, strict=True))
    )
    label = f"{title}: {', '.join(f'{words} {shown}' for words, _, shown in rows)}"
    return _figure(title, label, _ROW * len(rows), drawn)


def short(value: float) -> str:
    """Return a number in a few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _figure(title: str, label: str, height: int, drawn: str) -> str:
    """Return a figure with its title above the picture."""
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{text(label)}">{drawn}</svg></figure>'
    )


def _stroke(index: int) -> str:
    """Return the attributes of a line."""
    dashes = f' stroke-dasharray="{2 + 3 * (index // COLOURS)} 3"' if index >= COLOURS else ""
    return f'fill="none" stroke="var(--c{index % COLOURS})" stroke-width="1.6"{dashes}'


def _sample(index: int) -> str:
    """Return the picture of a line for the key."""
    return f'<svg viewBox="0 0 32 16" aria-hidden="true"><path d="M0 8H32" {_stroke(index)}/></svg>'
