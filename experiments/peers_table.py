"""Write the tables and the pictures of docs/peers.md from the committed results; with --check only compare them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import RESULTS, between, how, publish, spread
from gates_table import grouped, table
from peers_picture import picture, picture_name
from peers_standing import TUNING, Rows, measured, seconds, totals, verdict
from peers_tasks import TASKS
from peers_ways import OURS, PEERS, SETTINGS, WIDE

DOCS = Path(__file__).parent.parent / "docs"
SEEDS = 3  # a task is shown once it was measured with so many
ERRORS = {"housing": "mean squared error", "ETTh1": "mean squared error", "Shakespeare": "perplexity"}
DIGITS = {"housing": 4}
ESTIMATORS = "plasticnet"  # what the estimators are called in width_search.json


def measure_of(task: str) -> str:
    """What the errors of a task are."""
    return ERRORS.get(task, "percent wrong")


def seeds_of(rows: Rows) -> int:
    """With how many seeds every way of the full grid was tried, at every budget."""
    found = grouped([r for r in rows if r["way"] in (*OURS, *PEERS) and r["seed"] != TUNING], "way", "share")
    seeds = {key: len({r["seed"] for r in group}) for key, group in found.items()}
    shares = {share for _, share in seeds}
    return min((seeds.get((way, share), 0) for way in (*OURS, *PEERS) for share in shares), default=0)


def by_budget(rows: Rows, task: str) -> str:
    """The errors of all ways at all budgets, and their time."""
    found = [r for r in measured(rows) if r["task"] == task]
    dense, whole = ([r for r in found if r["way"] == way] for way in ("dense", WIDE))
    shares = sorted({r["share"] for r in found} - {1.0}, reverse=True)
    cells = []
    digits, seeds = DIGITS.get(task, 2), len({r["seed"] for r in dense})

    def cell(errors: list[float]) -> str:
        some = f" ({len(errors)} of {seeds} seeds)" if 0 < len(errors) < seeds else ""  # the others have failed
        return f"{spread(errors, digits)}{some}" if errors else ""

    for way in (way for way in SETTINGS if way != WIDE):
        mine = [r for r in found if r["way"] == way]
        if mine:
            errors = [[r["test"] for r in mine if r["share"] == share] for share in shares]
            cells.append([way, *map(cell, errors), f"{median(map(seconds, mine)):.0f}"])
    header = ["way", *(f"{share:.0%}" for share in shares), "CPU s"]
    what = measure_of(task)
    after = (
        f"; trained on: {cell([r['test'] for r in whole])}, {median(map(seconds, whole)):.0f} CPU s" if whole else ""
    )
    return "\n".join(
        [
            f"### {task}",
            "",
            f"Test error ({what}) by the share of the multiply-adds that is left; {seeds} seed{'s' * (seeds > 1)}. The "
            f"wide network before the further epochs: {spread([r['test'] for r in dense], digits)}, "
            f"{median(map(seconds, dense)):.0f} CPU s{after}.",
            "",
            *table(header, cells),
            "",
            f"![{task}: the test error of each way by parameters, multiply-adds and latency]({picture_name(task)})",
        ]
    )


def choices(rows: Rows) -> str:
    """The settings that validation data have chosen."""
    of = grouped(measured(rows), "task", "way")
    cells = []
    for task in dict.fromkeys(task for task, _ in of):
        for way in (way for way in SETTINGS if (task, way) in of):
            chosen = of[task, way][0]["setting"]
            cells.append([task, way, ", ".join(f"{k} {v}" for k, v in chosen.items())])
    return "\n".join(table(["task", "way", "setting"], cells))


def search(content: dict[str, Any]) -> str:
    """The estimators beside the Optuna search."""
    cells = []
    rows = sorted(content["results"], key=lambda r: (r["task"], "," in r["way"]))  # last what was tried before
    for (task, way), found in grouped(rows, "task", "way").items():
        ours = {r["seed"]: r["seconds"] for r in content["results"] if (r["task"], r["way"]) == (task, ESTIMATORS)}
        ratios = [ours[r["seed"]] / r["seconds"] for r in found if r["seed"] in ours]
        sizes = spread([r["parameters"] for r in found], 0)
        scores, times = spread([100 * r["score"] for r in found]), spread([r["seconds"] for r in found], 0)
        ratio = f"{median(ratios):.2f}" if ratios and not way.startswith(ESTIMATORS) else ""
        cells.append([task, way, str(len(found)), scores, sizes, times, ratio])
    header = ["task", "way", "seeds", "score, %", "parameters", "CPU s", "time of plasticnet over it"]
    return "\n".join([*table(header, cells), "", how(content)])


def attempts(content: dict[str, Any]) -> str:
    """What was tried at a tenth of the multiply-adds: a column for each task and learning rate."""
    rows, cells = content["results"], []
    columns = list(dict.fromkeys((r["task"], r["rate"]) for r in rows))
    tasks = list(dict.fromkeys(task for task, _ in columns))
    for (attempt,), found in grouped(rows, "attempt").items():
        errors = [[r["validation"] for r in found if (r["task"], r["rate"]) == column] for column in columns]
        digits = [DIGITS.get(task, 2) for task, _ in columns]
        times = [median(r["seconds"] for r in found if r["task"] == task) for task in tasks]
        cells.append([attempt, *map(spread, errors, digits), *(f"{t:.0f}" for t in times)])
    header = ["attempt", *(f"{task}, rate {rate}" for task, rate in columns)]
    header += [f"CPU s, {task}" for task in tasks]
    return "\n".join([*table(header, cells), "", how(content)])


def cifar(content: dict[str, Any], epochs_are: str) -> str:
    """ResNets on CIFAR-10: each way beside the whole network after as many epochs, as the header calls them."""
    rows, cells = content["results"], []
    of = grouped(rows, "depth", "epochs", "share", "way")
    for (depth, epochs, share, way), found in of.items():
        whole = of.get((depth, epochs, 1.0, "dense"), [])
        less = f"{mean(r['test'] for r in found) - mean(r['test'] for r in whole):+.2f}" if whole else ""
        cells.append(
            [
                f"ResNet-{depth}", f"{share:.0%}", way, str(epochs), str(len(found)),
                spread([r["test"] for r in found]), less if way != "dense" else "",
                spread([100 * r["macs"] for r in found]),
                spread([r["parameters"] for r in found], 0), spread([r["seconds"] for r in found], 0),
            ]
        )  # fmt: skip
    header = ["network", "budget", "way", epochs_are, "seeds", "test accuracy, %", "against dense"]
    header += ["multiply-adds, %", "parameters", "CPU s"]
    return "\n".join([*table(header, cells), "", how(content)])


def few(content: dict[str, Any]) -> str:
    """The smallest budget with the usual minimum and without."""
    cells = [
        [way, "usual" if floor else "1", str(len(found)), spread([r["before training"] for r in found], 1),
         spread([r["accuracy"] for r in found], 1), spread([r["parameters"] for r in found], 0)]
        for (way, floor), found in grouped(content["results"], "way", "floor").items()
    ]  # fmt: skip
    header = ["way", "minimum", "seeds", "right before training, %", "right after it, %", "parameters"]
    return "\n".join([*table(header, cells), "", how(content)])


def main() -> int:
    """Fill the page, and draw the pictures; or compare with --check."""
    names = ("width_search", "few_units", "peers_attempts", "cifar_gates", "cifar_scratch")
    searched, smallest, tried, resnets, from_random = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in names
    )
    paths = {name: RESULTS / f"peers_{name.lower()}.json" for name in TASKS}
    contents = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    tasks = [name for name, content in contents.items() if seeds_of(content["results"]) >= SEEDS]
    rows = [row for name in tasks for row in contents[name]["results"]]
    page = DOCS / "peers.md"
    text = between(between(page.read_text(), "totals", totals(rows)), "verdict", verdict(rows))
    parts = [f"{by_budget(rows, task)}\n\n{how(contents[task])}" for task in tasks]
    text = between(text, "budgets", "\n\n".join(parts))
    text = between(between(text, "choices", choices(rows)), "attempts", attempts(tried))
    text = between(text, "cifar", cifar(resnets, "further epochs"))
    text = between(text, "scratch", cifar(from_random, "epochs"))
    text = between(between(text, "search", search(searched)), "few", few(smallest))
    pictures = {DOCS / picture_name(task): picture(rows, task, measure_of(task)) for task in tasks}
    return publish({page: text} | pictures)


if __name__ == "__main__":
    sys.exit(main())
