"""Write the tables of docs/cost.md and its picture from what cost.py measured; --check only says whether they
are up to date."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
from common import between, how, publish, svg  # noqa: E402

DOCS = HERE.parent / "docs"
PAGE, PICTURE = DOCS / "cost.md", DOCS / "cost.svg"

Rows = Sequence[Mapping[str, Any]]

# Step, network, what is measured, over what, and the ratio that it must reach (none: for reference).
STEPS = [
    ("Plain, the same once more", "LeNet-5", "plain again", "plain 100", None),
    ("Plain, the same once more", "ResNet-20", "plain again", "plain 100", None),
    ("Stage 2, all units open", "LeNet-5", "stage 2 100", "plain 100", 1.40),
    ("Stage 2, all units open", "ResNet-20", "stage 2 100", "plain 100", 1.45),
    ("Stage 2, 10 % open", "LeNet-5", "stage 2 10", "plain 100", 0.20),
    ("Plain, hand-written with 10 % of the units", "LeNet-5", "plain 10", "plain 100", None),
    ("Stage 2, 10 % open", "ResNet-20", "stage 2 10", "plain 100", 0.30),
    ("Plain, hand-written with 10 % of the units", "ResNet-20", "plain 10", "plain 100", None),
    ("k = infinity, all units open", "LeNet-5", "infinity 100", "plain 100", 1.03),
    ("the same without penalty", "LeNet-5", "infinity, no penalty 100", "plain 100", None),
    ("k = infinity, all units open", "ResNet-20", "infinity 100", "plain 100", 1.03),
    ("the same without penalty", "ResNet-20", "infinity, no penalty 100", "plain 100", None),
    ("k = infinity, 10 % open", "LeNet-5", "infinity 10", "plain 10", 1.03),
    ("the same without penalty", "LeNet-5", "infinity, no penalty 10", "plain 10", None),
    ("k = infinity, 10 % open", "ResNet-20", "infinity 10", "plain 10", 1.03),
    ("the same without penalty", "ResNet-20", "infinity, no penalty 10", "plain 10", None),
]
INFERENCE, RESIZE, MEMORY = 1.05, 0.05, 1.0  # what these ratios must reach
# Of a whole run: time over the dense one's, error in %, share of the dense MACs, peak over the final size.
RUNS = {
    "prune": {"time": 0.50, "error": 1.0, "macs": 0.25},
    "grow": {"time": 0.35, "error": 1.0, "peak of macs": 1.5, "peak of parameters": 1.5},
}


def verdict(value: float, limit: float | None) -> tuple[str, str]:
    """The cells "must reach" and "met" of a ratio."""
    return ("", "") if limit is None else (f"≤ {limit:.2f}", "met" if value <= limit else "**missed**")


def ratio(seconds: Mapping[str, Mapping[str, float]], above: str, below: str) -> float:
    """The ratio of two medians."""
    return seconds[above]["median"] / seconds[below]["median"]


def milliseconds(timing: Mapping[str, float]) -> str:
    """Median and quartiles in ms, to three digits or so."""
    values = [1000 * timing[key] for key in ("median", "lower", "upper")]
    digits = 0 if values[0] >= 100 else 1 if values[0] >= 10 else 2 if values[0] >= 1 else 3
    middle, lower, upper = (f"{v:,.{digits}f}" for v in values)
    return f"{middle} ({lower} to {upper})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; the first column holds text."""
    rule = "|---|" + "---:|" * (len(header) - 1)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def steps(rows: Rows) -> list[str]:
    """Training steps over plain ones."""
    of = {row["network"]: row["seconds"] for row in rows}
    cells = []
    for what, network, above, below, limit in STEPS:
        found = ratio(of[network], above, below)
        times = [milliseconds(of[network][name]) for name in (above, below)]
        cells.append([what, network, f"{found:.3f}", *verdict(found, limit), *times])
    header = ["step", "network", "ratio", "must reach", "", "its ms (quartiles)", "ms of what it is compared with"]
    return table(header, cells)


def inference(rows: Rows) -> list[str]:
    """Compact over hand-written networks."""
    cells = []
    for row in rows:
        found = ratio(row["seconds"], "compact", "hand-written")
        ours, theirs = row["operations"]["compact"], row["operations"]["hand-written"]
        same = f"the same {sum(ours.values())}" if ours == theirs else "**different**"
        must, met = verdict(found, INFERENCE)
        times = [milliseconds(row["seconds"][name]) for name in ("compact", "hand-written")]
        name = f"{row['network']} at {'-'.join(map(str, row['widths']))}"
        cells.append([name, str(row["batch"]), same, f"{found:.3f}", must, met, *times])
    header = [
        "network",
        "batch",
        "operations",
        "ratio",
        "must reach",
        "",
        "compact, ms (quartiles)",
        "hand-written, ms",
    ]
    return table(header, cells)


def resize(rows: Rows) -> list[str]:
    """Changes of size over a training step."""
    cells = []
    for row in rows:
        for name, what in (("prune", "cut 10 % of every site"), ("grow", "add as many again")):
            found = ratio(row["seconds"], name, "step")
            times = [milliseconds(row["seconds"][n]) for n in (name, "step")]
            cells.append([f"{row['network']}: {what}", f"{found:.3f}", *verdict(found, RESIZE), *times])
    return table(["resize", "ratio", "must reach", "", "its ms (quartiles)", "ms of a plain step"], cells)


def memory(rows: Rows) -> list[str]:
    """Gate memory beside its bound."""
    cells = []
    for row in rows:
        higher = row["peak"]["stage 2"] - row["peak"]["plain"]
        gates = row["kept"] + row["optimizer"] + higher
        bound = 0.01 * row["parameters"] + row["largest_input"]
        parts = [row["kept"], row["optimizer"], higher, gates, row["parameters"], row["largest_input"], bound]
        cells.append(
            [
                row["network"],
                *(f"{n / 1024:,.1f}" for n in parts),
                f"{gates / bound:.3f}",
                *verdict(gates / bound, MEMORY),
            ]
        )
    header = [
        "KiB", "kept between steps", "Adam's state of φ", "peak of a step, higher by", "gate memory", "parameters",
        "largest input of a consumer", "bound", "gate memory / bound", "must reach", "",
    ]  # fmt: skip
    return table(header, cells)


def growth_of_cost(rows: Rows) -> list[str]:
    """Steps against the share of open units, and against width, over the plain step of the full network."""
    lines = []
    titles = {
        "open units": "Over the plain step of the full network, by the share of open units (the rest is cut):",
        "width": "Over the plain step of LeNet-5 at its own width, by width (everything open):",
    }
    for axis, title in titles.items():
        cells = []
        for row in (r for r in rows if r["axis"] == axis):
            value = f"{100 * row['value']:g} %" if axis == "open units" else f"{row['value']:g}"
            relative = [ratio(row["seconds"], name, "full") for name in ("plain", "stage 2")]
            cells.append(
                [
                    f"{row['network']}, {value}",
                    "-".join(map(str, row["widths"])),
                    f"{row['macs']:.4g}",
                    *(f"{r:.3g}" for r in relative),
                    f"{relative[1] / relative[0]:.2f}",
                    f"{row['seconds']['stage 2']['repeats']}",
                ]
            )
        header = ["network", "widths", "MACs", "plain step", "stage-2 step", "stage 2 over plain", "repeats"]
        lines += [title, "", *table(header, cells), ""]
    return [*lines, f"![Time of a step against multiply-adds]({PICTURE.name})"]


def runs(rows: Rows) -> list[str]:
    """Whole training runs: every seed, and what the mean must reach (the worst seed, for the peak)."""
    dense = {r["seed"]: r for r in rows if r["mode"] == "dense"}
    found: dict[str, dict[str, list[float]]] = {}
    cells = []
    for row in sorted(rows, key=lambda r: (["dense", "prune", "grow"].index(r["mode"]), r["seed"])):
        values = {
            "error": 100 * (1 - row["test_accuracy"]),
            "macs": row["macs"] / dense[row["seed"]]["macs"],
            **{f"peak of {what}": row[f"peak_{what}"] / row[what] for what in ("macs", "parameters")},
            "time": row["cpu_seconds"] / dense[row["seed"]]["cpu_seconds"],
        }
        for key, value in values.items():
            found.setdefault(row["mode"], {}).setdefault(key, []).append(value)
        peaks = [f"{values[f'peak of {what}']:.2f}" for what in ("macs", "parameters")]
        cells.append(
            [
                f"{row['mode']}, seed {row['seed']}",
                f"{values['error']:.2f}",
                "-".join(map(str, row["units"])),
                f"{row['macs']:,}",
                f"{row['parameters']:,}",
                ", ".join(peaks) if row["mode"] == "grow" else "",
                f"{row['cpu_seconds']:.0f}",
                f"{values['time']:.3f}",
            ]
        )
    header = [
        "run", "test error, %", "units", "MACs", "parameters", "peak over final: MACs, parameters", "CPU s",
        "over dense",
    ]  # fmt: skip
    names = {
        "time": "time over the dense run's", "error": "test error, %", "macs": "share of the MACs left",
        "peak of macs": "peak over final MACs, worst seed",
        "peak of parameters": "peak over final parameters, worst seed",
    }  # fmt: skip
    judged = []
    for mode, limits in RUNS.items():
        for key, limit in limits.items():
            values = found[mode][key]
            value = max(values) if key.startswith("peak") else fmean(values)
            deviation = "" if key.startswith("peak") else f" ± {stdev(values):.3f}"
            judged.append([f"{mode}: {names[key]}", f"{value:.3f}{deviation}", *verdict(value, limit)])
    stopped = [r["growth_stopped"] for r in rows if r["mode"] == "grow"]
    note = f"Growth stopped by itself in {sum(stopped)} of {len(stopped)} runs."
    return [*table(header, cells), "", *table(["", "mean ± standard deviation", "must reach", ""], judged), "", note]


PARTS: dict[str, Callable[[Rows], list[str]]] = {
    f.__name__: f for f in (steps, growth_of_cost, runs, inference, resize, memory)
}


def section(name: str, content: Mapping[str, Any]) -> str:
    """What stands between the markers of a part: how it was measured, and its tables."""
    settings = content["settings"]
    repeats = f", at most {settings['repeats']} repeats" if "repeats" in settings else ""
    return "\n".join([*PARTS[name](content["results"]), "", how(content).replace(":", f"{repeats}:", 1)])


def draw(rows: Rows) -> str:
    """The picture, as SVG: equal results give equal bytes."""

    def panels(figure: Any) -> None:
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.12, top=0.92, wspace=0.2)
        for axes, axis in zip(panels, ("open units", "width"), strict=True):
            chosen = [r for r in rows if r["axis"] == axis]
            for network, colour in (("LeNet-5", "#c0392b"), ("ResNet-20", "#2471a3")):
                points = [r for r in chosen if r["network"] == network]
                for variant, style in (("stage 2", "o-"), ("plain", "s:")):
                    if points:
                        y = [ratio(r["seconds"], variant, "full") for r in points]
                        label = f"{network}, {variant}"
                        axes.plot([r["macs"] for r in points], y, style, color=colour, ms=4, lw=1.2, label=label)
            ends = [min(r["macs"] for r in chosen), max(r["macs"] for r in chosen)]
            axes.plot(ends, ends, "--", color="#777777", lw=1, label="proportional")
            axes.set(xscale="log", yscale="log", ylabel="processor time of a step")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        panels[0].set(title="1 to 100 % of the units open", xlabel="multiply-adds of the open units, relative")
        panels[1].set(title="LeNet-5, ¼ to 16 times as wide", xlabel="multiply-adds, relative to LeNet-5")

    return svg(panels, (10, 4.6))


def main() -> int:
    """Replace what stands between the markers, and draw; or compare with --check."""
    paths = {name: HERE / "results" / f"cost_{name}.json" for name in PARTS}
    paths["runs"] = HERE.parent / "experiments" / "results" / "lenet_cost.json"
    contents = {name: json.loads(path.read_text()) for name, path in paths.items()}
    text = PAGE.read_text()
    for name, content in contents.items():
        text = between(text, name, section(name, content))
    picture = draw(contents["growth_of_cost"]["results"])
    return publish({PAGE: text, PICTURE: picture})


if __name__ == "__main__":
    sys.exit(main())
