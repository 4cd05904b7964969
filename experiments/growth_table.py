"""Write the tables of docs/design/growth.md from the committed results; with --check only compare them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import RESULTS, between, how, publish, spread
from gates_table import Rows, grouped, table

PAGE = Path(__file__).parent.parent / "docs" / "design" / "growth.md"
HEADER = (
    "task", "price of a parameter", "way", "seeds", "units", "parameters", "peak over end", "error", "objective",
    "CPU s", "of dense",
)  # fmt: skip
ORDER = ("dense", "pruned", "grown", "known")
PEERS = {
    "ours": "ours", "gradmax": "GradMax", "split": "splitting", "random": "random weights",
    "known": "these widths from the beginning",
}  # fmt: skip
LIVES = ("lifelong", "dense", "grown at once", "dense at once")
POINT = 1.0  # percent: what grown networks may be worse by, beside the spread of the pruned ones
ERRORS = "The error is that on the test data: percent wrong, or the mean squared error (housing)."
OBJECTIVE = "The objective is the mean loss on the training data and the price of all parameters."


def units(rows: Rows) -> str:
    """The widths of all sites."""
    widths = zip(*(r["units"].values() for r in rows), strict=True)
    return ", ".join(spread([float(n) for n in site], 1) for site in widths)


def errors(rows: Rows, task: str) -> str:
    """The mean error and its deviation."""
    return spread([r["test"] for r in rows], 3 if task == "housing" else 2)


def objectives(rows: Rows) -> str:
    """The mean of what was to be made small, and its deviation, where it was measured."""
    return spread([r["objective"] for r in rows], 3) if all("objective" in r for r in rows) else ""


def over_end(rows: Rows) -> str:
    """The largest number of parameters over that of the end."""
    return f"{fmean(r['peak']['parameters'] / r['parameters'] for r in rows):.2f}"


def line(key: tuple[str, float | None, str, int | None], rows: Rows, dense: Rows) -> list[str]:
    """The row of one way at one price."""
    task, price, way, start = key
    seconds = fmean(r["seconds"] for r in rows)
    return [
        task,
        "" if price is None else f"{price:.0e}",
        f"grown from {start} a site" if start else way,
        str(len(rows)),
        units(rows),
        spread([r["parameters"] for r in rows], 0),
        over_end(rows) if way == "grown" else "",
        errors(rows, task),
        objectives(rows) if way in ("grown", "pruned") else "",
        f"{seconds:.1f}",
        f"{seconds / fmean(r['seconds'] for r in dense):.2f}",
    ]


def price(content: Mapping[str, Any]) -> list[str]:
    """All ways at all prices."""
    tasks = list(dict.fromkeys(r["task"] for r in content["results"]))
    rows = sorted(
        content["results"],
        key=lambda r: (tasks.index(r["task"]), r["price"] or 0, ORDER.index(r["way"]), r["start"] or 0),
    )
    of = grouped(rows, "task", "price", "way", "start")
    dense = {key[0]: part for key, part in of.items() if key[2] == "dense"}
    return [*table(HEADER, [line(key, part, dense[key[0]]) for key, part in of.items()]), "", f"{ERRORS} {OBJECTIVE}"]


def pruned_at(task: str, price: float) -> list[float]:
    """The errors of the networks that were pruned at a price, in percent."""
    if task == "moons":
        rows = json.loads((RESULTS / "moons.json").read_text())["results"]
        return [100 * (1 - r["test_accuracy"]) for r in rows if r["mode"] == "prune"]
    rows = json.loads((RESULTS / "growth_price.json").read_text())["results"]
    return [r["test"] for r in rows if (r["task"], r["way"], r["price"]) == (task, "pruned", price)]


def share(values: Sequence[float], most: float) -> str:
    """How many values are at most so large, up to rounding."""
    return f"{sum(v <= most + 1e-4 for v in values)} of {len(values)}"


def stalls(content: Mapping[str, Any]) -> list[str]:
    """How the seeds lie beside the pruned networks."""
    cells, notes = [], []
    for (task,), rows in grouped(content["results"], "task").items():
        pruned, found = pruned_at(task, content["settings"]["prices"][task]), [r["test"] for r in rows]
        cells.append(
            [
                task, str(len(rows)), spread([r["parameters"] for r in rows], 0),
                f"{min(r['parameters'] for r in rows):,}", spread(pruned), spread(found), f"{max(found):.2f}",
                share(found, fmean(pruned) + stdev(pruned)), share(found, fmean(pruned) + POINT),
            ]
        )  # fmt: skip
        notes.append(f"{task} {', '.join(f'{e:.2f}' for e in sorted(found))}")
    header = [
        "task", "seeds", "parameters", "fewest", "error of pruned, %", "error of grown, %", "the worst",
        "within the spread", "within a point",
    ]  # fmt: skip
    return [*table(header, cells), "", f"The errors of all seeds: {'; '.join(notes)}."]


def peers(content: Mapping[str, Any]) -> list[str]:
    """Ours and its peers."""
    tasks = list(dict.fromkeys(r["task"] for r in content["results"]))
    rows = sorted(content["results"], key=lambda r: (tasks.index(r["task"]), list(PEERS).index(r["way"]), r["seed"]))
    cells = [
        [
            task, PEERS[way], str(len(part)), units(part), spread([r["parameters"] for r in part], 0), over_end(part),
            errors(part, task), f"{fmean(r['seconds'] for r in part):.1f}",
        ]
        for (task, way), part in grouped(rows, "task", "way").items()
    ]  # fmt: skip
    return table(["task", "way", "seeds", "units", "parameters", "peak over end", "test error, %", "CPU s"], cells)


def depth(content: Mapping[str, Any]) -> list[str]:
    """Blocks and parameters of the ways to find the depth of a ResNet."""
    cells = []
    for (way,), rows in grouped(content["results"], "way").items():
        paths = [[sum(map(int, b.split("-"))) for b in r["blocks"].split()] for r in rows]
        cells.append(
            [
                way, str(len(rows)), spread([float(p[0]) for p in paths], 1), spread([float(max(p)) for p in paths], 1),
                spread([float(p[-1]) for p in paths], 1), spread([r["parameters"] for r in rows], 0), over_end(rows),
                errors(rows, "digits"), objectives(rows), f"{fmean(r['seconds'] for r in rows):.1f}",
            ]
        )  # fmt: skip
    header = [
        "way", "seeds", "blocks after an epoch", "at most", "at the end", "parameters", "peak over end", "error, %",
        "objective", "CPU s",
    ]  # fmt: skip
    return table(header, cells)


def budget(content: Mapping[str, Any]) -> list[str]:
    """Growing beside pruning, under one budget."""
    rows = sorted(content["results"], key=lambda r: r["way"] == "grown")
    tasks = dict.fromkeys((r["task"], r["budget"]) for r in content["results"])
    of, cells = grouped(rows, "task", "budget", "way"), []
    for task, most in tasks:
        means = {}
        for way in ("pruned", "grown"):
            part = of.get((task, most, way), [])
            if not part:
                continue
            means[way] = [fmean(site) for site in zip(*(r["units"].values() for r in part), strict=True)]
            ratios = [a / b for a, b in zip(means[way], means["pruned"], strict=True)]
            cells.append(
                [
                    task, f"{most:,}", way, str(len(part)), units(part), spread([r["parameters"] for r in part], 0),
                    ", ".join(f"{r:.2f}" for r in ratios) if way == "grown" else "", over_end(part),
                    errors(part, task), f"{fmean(r['seconds'] for r in part):.1f}",
                ]
            )  # fmt: skip
    header = [
        "task", "parameters, at most", "way", "seeds", "units", "parameters", "units over those of pruned",
        "peak over end", "error", "CPU s",
    ]  # fmt: skip
    return [*table(header, cells), "", ERRORS]


def few(content: Mapping[str, Any]) -> list[str]:
    """MNIST under a budget of parameters: a row for each run, and their means."""
    header = ("way", "seed", "units", "parameters", "the most", "multiply-adds", "validation, %", "test, %", "CPU s")
    cells = []
    for (way,), rows in grouped(content["results"], "way").items():
        for r in sorted(rows, key=lambda r: r["seed"]):
            accuracies = f"{r['validation']:.2f}", f"{r['test']:.2f}"
            sizes = f"{r['parameters']:,}", f"{r['peak']:,}", f"{r['macs']:,}"
            cells.append([way, str(r["seed"]), "-".join(map(str, r["units"])), *sizes, *accuracies, f"{r['seconds']}"])
        accuracies = [spread([r[part] for r in rows]) for part in ("validation", "test")]
        cells.append([way, "all", "", spread([r["parameters"] for r in rows], 0), "", "", *accuracies, ""])
    return table(header, cells)


def lifelong(content: Mapping[str, Any]) -> list[str]:
    """The stages of all lives."""
    tasks = list(dict.fromkeys(r["task"] for r in content["results"]))
    rows = sorted(
        content["results"],
        key=lambda r: (tasks.index(r["task"]), -(r["replay"] or 0), LIVES.index(r["way"]), r["seed"]),
    )
    cells = []
    for (task, replay, way), part in grouped(rows, "task", "replay", "way").items():
        bounds = (0, *content["settings"]["courses"][task][0])
        for i, stage in enumerate(part[0]["stages"]):
            ends = [r["stages"][i] for r in part]
            groups = [(a, b) for a, b in pairwise(bounds) if b <= stage["classes"]]
            a, b = groups[-1]
            later = i > 0
            cells.append(
                [
                    f"{task}, {way}{'' if replay is None else f', replay of {replay:.0%}'}",
                    str(len(part)), f"0-{stage['classes'] - 1}", units(ends),
                    spread([e["parameters"] for e in ends], 0),
                    f"{max(e['peak'] / e['parameters'] for e in ends):.2f}",
                    spread([e["all"] for e in ends], 1), spread([e["stages"][0] for e in ends], 1),
                    spread([e["then"][0] for e in ends], 1),
                    f"{min(min(map(float, e['old on validation data'].split())) for e in ends):.1f}" if later else "",
                    f"{a}-{b - 1}: {spread([e['stages'][-1] for e in ends], 1)}" if len(groups) > 1 else "",
                    f"{fmean(e['seconds'] for e in ends):.0f}",
                ]
            )  # fmt: skip
    header = [
        "task and way", "seeds", "classes so far", "units", "parameters", "peak over end, at most", "accuracy, %",
        "of the first classes", "of these among themselves", "of old ones while learning, at least",
        "of the newest", "CPU s",
    ]  # fmt: skip
    return table(header, cells)


PARTS = {
    "price": ("growth_price", price), "stalls": ("growth_stalls", stalls), "peers": ("growth_peers", peers),
    "budget": ("growth_budget", budget), "depth": ("growth_depth", depth), "lifelong": ("growth_lifelong", lifelong),
    "few": ("growth_few", few),
}  # fmt: skip


def main() -> int:
    """Write the tables, or compare them."""
    text = PAGE.read_text()
    for name, (file, make) in PARTS.items():
        content = json.loads((RESULTS / f"{file}.json").read_text())
        commits = sorted({r["commit"] for r in content["results"] if "commit" in r})
        found = {**content["environment"], **({"commit": ", ".join(commits)} if commits else {})}
        text = between(text, name, "\n".join([*make(content), "", how({**content, "environment": found})]))
    return publish({PAGE: text})


if __name__ == "__main__":
    sys.exit(main())
