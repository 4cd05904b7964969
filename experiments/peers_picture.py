"""The pictures of docs/peers.md: the test error of each way by parameters, multiply-adds and latency."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

from common import svg
from gates_table import grouped
from peers_standing import Rows, deviation, measured
from peers_ways import ANEW, OURS, PEERS, WIDE

MARKS = dict(zip((*OURS, *PEERS, ANEW), "osD^v<P", strict=True))  # of the ways that were measured at all budgets
APART = 1.015  # by which the points of one way lie beside those of the next, where all would be at one place
Axis = Callable[[dict[str, Any]], float]


def picture_name(task: str) -> str:
    """The file of a task's picture."""
    return f"peers-{task.lower()}.svg"


def picture(rows: Rows, task: str, error: str) -> str:
    """Curves of the ways that were measured at all budgets, with the spread over seeds; ``error`` names the measure."""
    found = [r for r in measured(rows) if r["task"] == task]
    axes: dict[str, Axis] = {
        "parameters": lambda r: r["parameters"],
        "multiply-adds, share of the wide network's": lambda r: r["macs"],
        "latency, share of the wide network's": lambda r: r["latency"]["small"] / r["latency"]["dense"],
    }

    def draw(figure: Any) -> None:
        places = figure.subplots(1, len(axes), sharey=True)
        for number, (place, (name, of)) in enumerate(zip(places, axes.items(), strict=True)):
            for n, (way, mark) in enumerate(MARKS.items()):
                mine = [r for r in found if r["way"] == way]
                apart = APART ** (n - len(MARKS) // 2) if number == 1 else 1.0
                _curve(place, mine, lambda r, of=of, apart=apart: apart * of(r), way, mark)
            whole = [r["test"] for r in found if r["way"] == WIDE]
            if whole:
                place.axhline(mean(whole), ls=":", color="grey", lw=1, label=WIDE)
            _scale(place, name)
        places[0].set_ylabel(f"{task}: {error} on test data")
        handles, labels = places[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=7, frameon=False)
        figure.tight_layout(rect=(0, 0.1, 1, 1))

    return svg(draw, (11, 4.4))


def _curve(place: Any, rows: Rows, of: Axis, way: str, mark: str) -> None:
    """A line through the means at each budget, with the spread of both."""
    points = []
    for _, group in grouped(sorted(rows, key=lambda r: r["share"]), "share").items():
        at, errors = [of(dict(r)) for r in group], [r["test"] for r in group]
        points.append((mean(at), mean(errors), deviation(at), deviation(errors)))
    if points:
        x, y, across, along = zip(*points, strict=True)
        width = 2.2 if way in (*OURS, ANEW) else 1.0
        place.errorbar(x, y, along, across, label=way, marker=mark, ms=4, lw=width, elinewidth=0.8, capsize=2)


def _scale(place: Any, name: str) -> None:
    """A logarithmic axis with few and plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    place.set_xscale("log")
    place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    place.xaxis.set_minor_formatter(NullFormatter())
    place.set_xlabel(name)
    place.tick_params(axis="x", labelsize=7)  # wide numbers would touch one another
