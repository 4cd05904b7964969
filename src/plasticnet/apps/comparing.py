"""Draws an HTML page that compares several runs: a table, curves, and the open units of every site by epoch.

The pictures are small SVGs in the colours of the page, so that they follow a dark screen, and as wide as they can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plasticnet.apps.drawing import COLOURS, STYLE, Line, curves, key
from plasticnet.apps.page import Markup, joined, markup, page, table
from plasticnet.apps.scores import shown

_COLUMNS = ("network", "data", "model", "test score", "units per site", "parameters", "MACs", "ms per 1,000 inputs",
            "epochs", "training, CPU s")  # fmt: skip
_SITES = 60  # how many sites of a network are drawn

_STYLE = f"""{STYLE}
.sites {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(9rem, 100%), 1fr)); }}
.sites figure {{ margin: 0; min-width: 0; }} .sites svg {{ width: 100%; background: none; }}
.sites figcaption {{ font-size: .8rem; line-height: 1.3; }}
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
    pictures = [curves("validation loss", _lines(entries, "val_loss"))]
    for score in scores:
        pictures.append(curves(f"validation {score}", _lines(entries, "val_score", score)))
    pictures.append(curves("parameters", _lines(entries, "parameters"), log=True))
    pictures.append(curves("multiply-adds", _lines(entries, "macs"), log=True))
    body = markup(
        '{}<h2>Epoch by epoch</h2>{}<div class="pictures">{}</div><h2>Architecture</h2><p>A bar is an epoch, and as '
        "high as the site has open units; the sites of a network share their scale, which is logarithmic.</p>{}",
        table(_COLUMNS, [_row(entry) for entry in entries]), key(names), joined(pictures),
        joined(_sites(i, entry) for i, entry in enumerate(entries)),
    )  # fmt: skip
    return page(f"plasticnet: {len(entries)} networks", body, _STYLE)


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


def _lines(entries: Sequence[Entry], field: str, score: str | None = None) -> list[Line]:
    """Return a line for each network, without points where the network has another score than the one that is asked."""
    return [Line(entry.name, _points(entry, field) if score in (None, _score_name(entry)) else []) for entry in entries]


def _points(entry: Entry, field: str) -> list[tuple[int, float]]:
    """Return what the records of a network have in a field, by epoch; without what is missing or not finite."""
    return _finite([(record["epoch"], record.get(field)) for record in entry.history])


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


def _sites(index: int, entry: Entry) -> Markup:
    """Return small pictures with bars of the open units of a network's sites, by epoch."""
    units = _units(entry)
    top = max((n for bars in units.values() for _, n in bars), default=1)
    pictures = joined(_bars(index, site, bars, top) for site, bars in list(units.items())[:_SITES])
    rest = markup('<p class="faint">and {} more sites</p>', len(units) - _SITES) if len(units) > _SITES else ""
    return markup('<h3>{}</h3><div class="sites">{}</div>{}', entry.name, pictures, rest)


def _bars(index: int, site: str, bars: Sequence[tuple[int, int]], top: int) -> Markup:
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
    return markup(
        '<figure><svg viewBox="0 0 120 50" role="img" aria-label="{}"><path class="grid" d="M0 48.5H120"/>'
        '<path d="{}" fill="var(--c{})"/></svg><figcaption>{}: {:,} → {:,}</figcaption></figure>',
        label, path, index % COLOURS, site, first, last,
    )  # fmt: skip
