"""Draws an HTML page that compares several runs: a table, curves, and the open units of every site by epoch.

The pictures are small SVGs in the colours of the page, so that they follow a dark screen, and as wide as they can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plasticnet.apps.page import page, table, text
from plasticnet.apps.scores import shown

_COLUMNS = ("network", "data", "model", "test score", "units per site", "parameters", "MACs", "ms per 1,000 inputs",
            "epochs", "training, CPU s")  # fmt: skip
_COLOURS = 8  # how many colours the page has; further networks have them again, with dashed lines
_SITES = 60  # how many sites of a network are drawn
_WIDTH, _HEIGHT = 360, 200  # of a picture of curves
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 10, 22  # the margins, which hold the numbers at the axes

_STYLE = """
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
.key svg { width: 1.6rem; height: .8rem; margin-right: .4rem; }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.sites { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(9rem, 100%), 1fr)); }
.curves figure, .sites figure { margin: 0; min-width: 0; } .curves svg, .sites svg { width: 100%; background: none; }
.sites figcaption { font-size: .8rem; line-height: 1.3; }
.axis { fill: var(--faint); font-size: 11px; } .grid { stroke: var(--line); stroke-width: 1; }
"""


@dataclass(frozen=True)
class Entry:
    """A network in a comparison.

    Attributes:
        name: What it is called on the page.
        data: The name of its data.
        model: The name of its model.
        result: How its run ended: its part of summary.json.
        history: Its lines of metrics.jsonl.
    """

    name: str
    data: str
    model: str
    result: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]


def compare(entries: Sequence[Entry]) -> str:
    """Return the text of a page about some networks."""
    names = [entry.name for entry in entries]
    scores = dict.fromkeys(_score_name(entry) for entry in entries)
    pictures = [_curves("validation loss", entries, [_points(e, "val_loss") for e in entries])]
    for score in scores:
        points = [_points(e, "val_score") if _score_name(e) == score else [] for e in entries]
        pictures.append(_curves(f"validation {score}", entries, points))
    pictures.append(_curves("parameters", entries, [_points(e, "parameters") for e in entries], log=True))
    pictures.append(_curves("multiply-adds", entries, [_points(e, "macs") for e in entries], log=True))
    keys = "".join(f"<li>{_line_sample(i)}{text(name)}</li>" for i, name in enumerate(names))
    return page(
        f"plasticnet: {len(entries)} networks",
        table(_COLUMNS, [_row(entry) for entry in entries])
        + f'<h2>Epoch by epoch</h2><ul class="key">{keys}</ul><div class="curves">{"".join(pictures)}</div>'
        + "<h2>Architecture</h2><p>A bar is an epoch, and as high as the site has open units; the sites of a network "
        "share their scale, which is logarithmic.</p>" + "".join(_sites(i, entry) for i, entry in enumerate(entries)),
        _STYLE,
    )


# -- what the files of a run call things: nothing else in here knows it ------------------------


def _score_name(entry: Entry) -> str:
    """Return what the score of a network is: an accuracy, or R²."""
    return str(entry.result["score"])


def _row(entry: Entry) -> list[str]:
    """Return the cells of a network's row."""
    result = entry.result
    return [
        entry.name, entry.data, entry.model, shown(result["test_score"], result["task"]),
        "-".join(str(n) for n in result["units"].values()),
        f"{result['parameters']:,}", f"{result['macs']:,}", f"{result['ms_per_1000']:.2f}", str(len(entry.history)),
        f"{result['train_cpu_seconds']:.1f}",
    ]  # fmt: skip


def _points(entry: Entry, key: str) -> list[tuple[int, float]]:
    """Return what the records of a network have under a key, by epoch; without what is missing or not finite."""
    return _finite([(record["epoch"], record.get(key)) for record in entry.history])


def _units(entry: Entry) -> dict[str, list[tuple[int, int]]]:
    """Return the open units of every site of a network, by epoch."""
    found: dict[str, list[tuple[int, int]]] = {}
    for record in entry.history:
        for site, count in record["units"].items():
            found.setdefault(site, []).append((record["epoch"], count))
    return found


# -- pictures ----------------------------------------------------------------------------------


def _finite(pairs: Sequence[tuple[int, Any]]) -> list[tuple[int, float]]:
    """Return the pairs whose second part is a finite number."""
    return [(x, y) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def _stroke(index: int) -> str:
    """Return the attributes of a network's line."""
    dashes = f' stroke-dasharray="{2 + 3 * (index // _COLOURS)} 3"' if index >= _COLOURS else ""
    return f'fill="none" stroke="var(--c{index % _COLOURS})" stroke-width="1.6"{dashes}'


def _line_sample(index: int) -> str:
    """Return the picture of a network's line for the key."""
    return f'<svg viewBox="0 0 32 16" aria-hidden="true"><path d="M0 8H32" {_stroke(index)}/></svg>'


def _curves(
    title: str, entries: Sequence[Entry], series: Sequence[Sequence[tuple[int, float]]], log: bool = False
) -> str:
    """Return a picture with a line for each network.

    Args:
        title: What is drawn.
        entries: The networks.
        series: For each network the epochs and the values.
        log: Whether the axis of values is logarithmic.
    """
    if log:
        series = [[(x, y) for x, y in points if y > 0] for points in series]
    values = [y for points in series for _, y in points]
    if not values:
        return f"<figure><figcaption>{text(title)}: not recorded</figcaption></figure>"
    last = max(x for points in series for x, _ in points)
    low, high = min(values), max(values)

    def place(value: float) -> float:
        a, b, v = (math.log(low), math.log(high), math.log(value)) if log else (low, high, value)
        share = (v - a) / (b - a) if b > a else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def across(epoch: int) -> float:
        share = (epoch - 1) / (last - 1) if last > 1 else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    middle = math.sqrt(low * high) if log else (low + high) / 2
    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {place(v):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text class="axis" x="{_LEFT - 4}" y="{place(v) + 4:.1f}" text-anchor="end">{_short(v)}</text>'
        for v in sorted({low, middle, high})
    )
    axis = "".join(
        f'<text class="axis" x="{across(x):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{x}</text>'
        for x, anchor in {1: "start", last: "end"}.items()
    )
    lines = "".join(
        f'<path d="M{"L".join(f"{across(x):.1f} {place(y):.1f}" for x, y in points)}" {_stroke(i)}>'
        f"<title>{text(entry.name)}: {_short(points[-1][1])} after epoch {points[-1][0]}</title></path>"
        for i, (entry, points) in enumerate(zip(entries, series, strict=True))
        if points
    )
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{text(title)} by epoch">{grid}{axis}{lines}</svg></figure>'
    )


def _sites(index: int, entry: Entry) -> str:
    """Return small pictures with bars of the open units of a network's sites, by epoch."""
    units = _units(entry)
    top = max((n for bars in units.values() for _, n in bars), default=1)
    pictures = "".join(_bars(index, site, bars, top) for site, bars in list(units.items())[:_SITES])
    rest = f'<p class="faint">and {len(units) - _SITES} more sites</p>' if len(units) > _SITES else ""
    return f'<h3>{text(entry.name)}</h3><div class="sites">{pictures}</div>{rest}'


def _bars(index: int, site: str, bars: Sequence[tuple[int, int]], top: int) -> str:
    """Return a picture with a bar for each epoch of a site.

    Args:
        index: The number of the network.
        site: The name of the site.
        bars: The epochs and the open units.
        top: The number of units that is as high as the picture.
    """
    first, last = bars[0][1], bars[-1][1]
    step = 120 / len(bars)
    path = "".join(
        f"M{i * step:.2f} 48V{48 - 46 * math.log1p(n) / math.log1p(max(top, 1)):.2f}h{max(0.8 * step, 0.4):.2f}V48z"
        for i, (_, n) in enumerate(bars)
    )
    label = f"{site}: {first:,} to {last:,} open units in {len(bars)} epochs"
    return (
        f'<figure><svg viewBox="0 0 120 50" role="img" aria-label="{text(label)}"><path class="grid" d="M0 48.5H120"/>'
        f'<path d="{path}" fill="var(--c{index % _COLOURS})"/></svg>'
        f"<figcaption>{text(site)}: {first:,} → {last:,}</figcaption></figure>"
    )


def _short(value: float) -> str:
    """Return a number in a few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
