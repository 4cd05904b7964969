"""Write the tables and pictures of docs/gates.md from the committed results, and a table of docs/results.md; with
--check only say whether they are up to date."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import RESULTS, between, how, publish, spread, svg

BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "results"
DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURE, RESULTS_PAGE = DOCS / "gates.md", DOCS / "interpolation.svg", DOCS / "results.md"

# Error in % and cost: Dai et al. 2018 (VIB), Louizos et al. 2017 (BC-GHS), Neklyudov et al. 2017 (SBP).
PUBLISHED = {
    "a": "BC-GHS: 1.0 at 158K", "b": "SBP: 0.86 at 217K", "c": "BC-GHS: 1.0 at 2,751", "g": "BC-GHS: 1.0 at 2,751",
    "d": "VIB: 1.6 at 9.6K", "e": "VIB: 1.6 at 9.6K", "l": "VIB: 1.6 at 9.6K",
}  # fmt: skip
ENDS = {"pruned": "pruned", "grown": "grown", "known": "these widths known, from random weights"}

Rows = Sequence[Mapping[str, Any]]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; the first column holds text."""
    return [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1), *(f"| {' | '.join(r)} |" for r in rows)]


def grouped(rows: Rows, *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """The rows by the values of these keys, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)
    return found


def percent(rows: Rows, key: str = "test_accuracy") -> str:
    """Mean and deviation of an accuracy's complement, in %."""
    return spread([100 * (1 - r[key]) for r in rows])


def variance(content: Mapping[str, Any]) -> list[str]:
    """A row for every estimator: variances relative to the paper's ARM, with and without the time of a step."""
    rows, seconds = content["results"]["variances"], content["results"]["seconds"]
    of = grouped(rows, "estimator", "gates", "state")
    states = list(dict.fromkeys(r["state"] for r in rows))

    def relative(name: str, gates: str, state: str) -> list[float]:
        paper = {r["seed"]: r["variance"] for r in of["arm", "batch", state]}
        return [r["variance"] / paper[r["seed"]] for r in of[name, gates, state]]

    def step(network: str, name: str, gates: str) -> float:
        return seconds[network][f"{name} {gates}"]["median"] / seconds[network]["plain"]["median"]

    cells = []
    for name, gates in dict.fromkeys((r["estimator"], r["gates"]) for r in rows):
        cost = step("LeNet-5", name, gates)
        row = [f"{name}, per {gates}"]
        for state in states:
            values = relative(name, gates, state)
            equal = fmean(values) * cost / step("LeNet-5", "arm", "batch")
            row += [f"{fmean(values):.3g} ({min(values):.2g} to {max(values):.2g})", f"{1 / equal:,.1f}"]
        found = [r for s in states for r in of[name, gates, s]]
        off, noise = (fmean(r[key] / r["gradient"] for r in found) ** 0.5 for key in ("distance", "noise_of_distance"))
        row += [f"{off:.0%} ({noise:.0%})"]
        cells.append([*row, f"{cost:.2f}", f"{step('ResNet-20', name, gates):.2f}"])
    header = ["estimator"]
    for state in states:
        header += [f"variance, {state}", "times better at equal time"]
    return table([*header, "distance (by chance)", "step, LeNet-5", "step, ResNet-20"], cells)


def runs(part: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """A table of one list of the ablation."""

    def lines(content: Mapping[str, Any]) -> list[str]:
        cells = []
        chosen = [r for r in content["results"] if r["part"] == part]
        for (name,), rows in grouped(chosen, "variant").items():
            cells.append(
                [
                    name, percent(rows), spread([r["macs"] / 1000 for r in rows], 0),
                    spread([r["parameters"] / 1000 for r in rows], 1),
                    ", ".join("-".join(map(str, r["units"])) for r in rows),
                    f"{fmean(r['history'][-7]['transition'] for r in rows):.3f}",
                    spread([r["cpu_seconds"] for r in rows], 0),
                ]
            )  # fmt: skip
        header = ["", "test error, %", "MACs, K", "parameters, K", "units", "transition", "CPU s"]
        return table(header, cells)

    return lines


def budgets(content: Mapping[str, Any]) -> list[str]:
    """Target and what was reached, for every network and cost."""
    rows, cells = content["results"], []
    dense = {r["network"]: r for r in rows if r["budget"] is None}
    for row in (r for r in rows if r["budget"] is not None and "loss" not in r["budget"]):
        ((kind, share),) = row["budget"].items()
        met = row["reached"] <= row["target"] and (
            row["below_percent"] <= 2 or row["target"] - row["reached"] < row["one_more"]
        )
        cells.append(
            [
                f"{row['network']}, {kind}, {share:.0%}", f"{row['target']:,.0f}", f"{row['reached']:,.0f}",
                f"{row['below_percent']:.2f} %", f"{row['one_more']:,.0f}", "met" if met else "**missed**",
                f"{100 * row['test_accuracy']:.2f}", f"{100 * dense[row['network']]['test_accuracy']:.2f}",
            ]
        )  # fmt: skip
    header = [
        "network, cost, share", "target", "reached", "below", "one more unit costs", "", "test accuracy, %", "dense, %",
    ]  # fmt: skip
    lines = table(header, cells)
    for row in (r for r in rows if r["budget"] is not None and "loss" in r["budget"]):
        before = dense[row["network"]]
        lines += [
            "",
            f"`Budget(loss={row['budget']['loss']})`, {row['network']}: validation loss {row['val_loss']:.3f} (at most "
            f"{row['limit']:.3f}), {row['parameters']:,} of {before['parameters']:,} parameters, test accuracy "
            f"{100 * row['test_accuracy']:.2f} %.",
        ]
    return lines


def precisions(content: Mapping[str, Any]) -> list[str]:
    """Accuracy and cost of every network in every precision, and how far half precision is from single precision."""
    cells = []
    of = grouped(content["results"], "network", "precision")
    for (network, precision), rows in of.items():
        single = {r["seed"]: r["test_accuracy"] for r in of[network, "float32"]}
        differences = [100 * (r["test_accuracy"] - single[r["seed"]]) for r in rows if r["seed"] in single]
        met = all(r["finite"] and r["reached"] <= r["target"] for r in rows)
        cells.append(
            [
                f"{network}, {precision}", str(len(rows)), spread([100 * r["test_accuracy"] for r in rows]),
                "" if precision == "float32" else spread(differences), ", ".join(f"{r['reached']:,}" for r in rows),
                f"{rows[0]['target']:,.0f}", "met" if met else "**missed**",
                ", ".join("-".join(map(str, r["units"])) for r in rows), str(sum(r["skipped"] for r in rows)),
                spread([r["cpu_seconds"] for r in rows], 0),
            ]
        )  # fmt: skip
    header = [
        "network, precision", "seeds", "test accuracy, %", "less float32, points", "multiply-adds", "at most", "",
        "units", "steps skipped", "CPU s",
    ]  # fmt: skip
    return table(header, cells)


def targets(content: Mapping[str, Any]) -> list[str]:
    """The operating points on MNIST: every seed, and the mean beside what it must reach."""
    cells = []
    ordered = sorted(content["results"], key=lambda r: (r["point"], r["end"] != "pruned", r["end"], r["seed"]))
    for (point, end), rows in grouped(ordered, "point", "end").items():
        goal = content["settings"]["points"][point]
        error = round(fmean(100 * (1 - r["test_accuracy"]) for r in rows), 6)  # 225 errors in 30,000 are 0.75 %
        met = error <= goal["error"] and all(r[goal["cost"]] <= goal["target"] for r in rows)
        cells.append(
            [
                f"({point}) {goal['title']}, {ENDS[end]}", percent(rows), f"≤ {goal['error']:.2f}",
                ", ".join(f"{r[goal['cost']]:,}" for r in rows), f"≤ {goal['target']:,}",
                "met" if met else "**missed**",
                ", ".join("-".join(map(str, r["units"])) for r in rows if r["units"]), f"{rows[0]['epochs']}",
                spread([r["cpu_seconds"] for r in rows], 0),
            ]
        )  # fmt: skip
    header = ["point", "test error, %", "must reach", "cost", "must reach", "", "units", "epochs", "CPU s"]
    return table(header, cells)


def pixels(content: Mapping[str, Any]) -> list[str]:
    """What the pixels that a small MLP can afford tell, with few hidden units behind them and with many."""
    cells = []
    for (chosen, wide), rows in grouped(content["results"], "pixels", "wide").items():
        sizes = ", ".join("-".join(map(str, r["sizes"])) for r in rows)
        costs = spread([r["macs"] for r in rows], 0)
        cells.append(
            [chosen, "wide" if wide else "of the budget", sizes, costs, spread([r["validation"] for r in rows])]
        )
    dense = spread([r["dense"] for r in content["results"][:: len(cells)]])
    cells.append(["all", "wide", "784-300-100-10", "266,200", dense])
    return table(["pixels", "hidden units", "sizes", "multiply-adds", "validation error, %"], cells)


def headline(content: Mapping[str, Any]) -> list[str]:
    """The same for docs/results.md: mean errors only, beside what others have published."""
    cells = []
    of = grouped(content["results"], "point", "end")
    points = content["settings"]["points"]
    for point in dict.fromkeys(point for point, _ in sorted(of)):
        goal, pruned = points[point], of[point, "pruned"]
        cost = max(r[goal["cost"]] for rows in of.values() for r in rows if r["point"] == point)
        errors = [percent(of[point, end]) if (point, end) in of else "" for end in ENDS]
        cells.append([goal["title"], f"{cost:,}", str(len(pruned)), *errors, PUBLISHED.get(point, "")])
    header = ["network, cost, granularity", "cost, at most", "seeds", *(f"error, %, {e}" for e in ENDS.values())]
    return table([*header, "published: error, %, and cost"], cells)


def label(k: float | str) -> str:
    """How k is written."""
    return "∞" if k == "inf" else k if isinstance(k, str) else f"{k:g}"


def interpolation(content: Mapping[str, Any]) -> list[str]:
    """A row for each k, and the two ends by hand, all with the same seeds; then the ends with all that they have."""
    seeds = set.intersection(*({r["seed"] for r in rows} for rows in grouped(content["results"], "k").values()))
    cells = []
    for (k,), rows in grouped([r for r in content["results"] if r["seed"] in seeds], "k").items():
        names = {"dropout": "nn.Dropout(0.5), by hand", "plain": "no dropout, by hand"}
        transition = f"{fmean(r['transition'] for r in rows):.3f}" if "transition" in rows[0] else ""
        cells.append(
            [
                names.get(k, f"k = {label(k)}"), str(len(rows)),
                spread([100 * r["val_accuracy"] for r in rows]), spread([100 * r["test_accuracy"] for r in rows]),
                spread([r["parameters"] for r in rows], 0), transition,
            ]
        )  # fmt: skip
    lines = table(["", "seeds", "validation accuracy, %", "test accuracy, %", "parameters", "transition"], cells)
    of = {k: [100 * r["val_accuracy"] for r in rows] for (k,), rows in grouped(content["results"], "k").items()}
    for k, by_hand in ((0.0, "dropout"), ("inf", "plain")):
        differences = [a - b for a, b in zip(of[k], of[by_hand], strict=True)]
        error = stdev(differences) / len(differences) ** 0.5
        lines += [
            "",
            f"k = {label(k)} less {by_hand} by hand: {fmean(differences):+.2f} ± {error:.2f} points of validation "
            f"accuracy (mean and its standard error over {len(differences)} pairs).",
        ]
    return [*lines, "", f"![Accuracy, size and transition probability against k]({PICTURE.name})"]


def draw(rows: Rows) -> str:
    """The picture of the interpolation."""

    def panels(figure: Any) -> None:
        axes = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.14, top=0.9, wspace=0.28)
        by_k = {k: r for (k,), r in grouped(rows, "k").items() if k not in ("dropout", "plain")}
        titles = {
            "val_accuracy": ("validation accuracy, %", 100),
            "parameters": ("open parameters", 1),
            "transition": ("transition probability 2π(1-π)", 1),
        }
        for ax, (key, (title, scale)) in zip(axes, titles.items(), strict=True):
            for x, found in enumerate(by_k.values()):
                ax.plot([x] * len(found), [scale * r[key] for r in found], "o", color="#2471a3", ms=4, alpha=0.6)
            means = [fmean(scale * r[key] for r in found) for found in by_k.values()]
            ax.plot(range(len(means)), means, "-", color="#2471a3", lw=1.2)
            for name, colour in (("dropout", "#c0392b"), ("plain", "#1e8449")):
                values = [scale * r[key] for r in rows if r["k"] == name and key in r]
                if values:
                    ax.axhline(fmean(values), color=colour, lw=1, ls="--", label=f"{name}, by hand")
            ax.set_xticks(range(len(by_k)), [label(k) for k in by_k])
            ax.set(title=title, xlabel="k")
            ax.grid(alpha=0.3)
        axes[0].legend(fontsize=8)

    return svg(panels, (12, 3.8))


PARTS: dict[str, tuple[Path, Callable[[Mapping[str, Any]], list[str]]]] = {
    "variance": (BENCHMARKS / "variance.json", variance),
    "estimators": (RESULTS / "ablation.json", runs("estimators")),
    "ideas": (RESULTS / "ablation.json", runs("ideas")),
    "targets": (RESULTS / "lenet_targets.json", targets),
    "pixels": (RESULTS / "few_pixels.json", pixels),
    "budgets": (RESULTS / "budgets.json", budgets),
    "precisions": (RESULTS / "half_precision.json", precisions),
    "interpolation": (RESULTS / "interpolation.json", interpolation),
}


def main() -> int:
    """Fill the page and draw; or compare with --check."""
    text = PAGE.read_text()
    for name, (path, make) in PARTS.items():
        content = json.loads(path.read_text())
        rows = content["results"] if isinstance(content["results"], list) else []
        commits = sorted({r["commit"] for r in rows if "commit" in r} or {content["environment"]["commit"]})
        found = {**content["environment"], "commit": ", ".join(commits)}
        text = between(text, name, "\n".join([*make(content), "", how({**content, "environment": found})]))
    points, picture = (json.loads(PARTS[name][0].read_text()) for name in ("targets", "interpolation"))
    readme = between(RESULTS_PAGE.read_text(), "targets", "\n".join(headline(points)))
    return publish({PAGE: text, RESULTS_PAGE: readme, PICTURE: draw(picture["results"])})


if __name__ == "__main__":
    sys.exit(main())
