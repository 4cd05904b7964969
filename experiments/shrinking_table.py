"""Write the tables of docs/shrinking.md from the committed results; --check only says whether they are up to date."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from common import RESULTS, between, how, publish, spread
from gates_table import Rows, grouped, table
from scipy.stats import spearmanr
from shrink_ablation import GATES, WAYS

PAGE = Path(__file__).parent.parent / "docs" / "shrinking.md"
TITLES = {
    "lenet": "LeNet-5, Fashion-MNIST", "resnet20": "ResNet-20, CIFAR-10", "vit": "ViT, Fashion-MNIST",
    "bert": "BERT, SST-2", "gpt2": "GPT-2, tiny Shakespeare", "llama": "Llama, tiny Shakespeare",
}  # fmt: skip
WIDTHS = {  # of the networks of repair.py
    "lenet": {"conv1": 20, "conv2": 50, "fc1": 500},
    "resnet20": {"conv1": 16, "layer1": 16, "layer2": 32, "layer3": 64},
}
LANGUAGE = ("gpt2", "llama")  # networks that predict the next character
LEAST = 5  # so many units of a site must have been measured for a correlation within it


def thinnest(rows: Rows) -> str:
    """What is left of the site that has lost the largest share of its units, in any of the rows."""
    sites = [found for r in rows for found in r["units"].values()]
    kept, units = min(sites, key=lambda found: (found[0] / found[1], found[0]))
    return f"{kept} of {units}"


def one_shot(content: Mapping[str, Any]) -> list[str]:
    """The rows of repair.py."""
    cells = []
    for row in sorted(content["results"], key=lambda r: (r["network"], -r["share"])):
        widths = WIDTHS[row["network"]]
        units = {n: (kept, widths[n.split(".")[0]]) for n, kept in row["units"].items()}
        cells.append(
            [
                f"{TITLES[row['network']]}, {row['share']:.0%}", row["scores"], f"{row['dense']:.1f}",
                *(f"{row['accuracy'][step]:.1f}" for step in ("at once", "repaired")),
                *(f"{row['error'][step]:.2g}" for step in ("at once", "repaired")), thinnest([{"units": units}]),
                *(f"{row['seconds'][step]:.0f}" for step in ("scores", "repair")),
            ]
        )  # fmt: skip
    header = [
        "network, share", "scores", "accuracy, %, whole", "cut", "repaired", "error, cut", "repaired", "fewest left",
        "CPU s, scores", "repair",
    ]  # fmt: skip
    return table(header, cells)


def transformers(content: Mapping[str, Any]) -> list[str]:
    """The rows of transformers_cut.py: a row for each network, share and kind of score, over its seeds."""
    cells = []
    ordered = sorted(content["results"], key=lambda r: (list(TITLES).index(r["network"]), -r["share"]))
    for (name, share, kind, blocks), rows in grouped(ordered, "network", "share", "scores", "blocks").items():
        quality, digits = (perplexity, 2) if name in LANGUAGE else (accuracy, 1)
        cells.append(
            [
                f"{TITLES[name]}, {share:.0%}", f"{kind}, layers too" if blocks else kind, str(len(rows)),
                *(spread([quality(r[step]) for r in rows], digits) for step in ("whole", "at once", "repaired")),
                *(f"{fmean(r[step]['error'] for r in rows):.2g}" for step in ("at once", "repaired")), thinnest(rows),
                *(f"{fmean(r[f'{step}_cpu_seconds'] for r in rows):.1f}" for step in ("score", "repair")),
            ]
        )  # fmt: skip
    header = [
        "network, share", "scores", "seeds", "accuracy, %, or perplexity, whole", "cut", "repaired", "error, cut",
        "repaired", "fewest left", "CPU s, scores", "repair",
    ]  # fmt: skip
    return table(header, cells)


def accuracy(measured: Mapping[str, float]) -> float:
    """The share of right answers, in percent."""
    return measured["accuracy"]


def perplexity(measured: Mapping[str, float]) -> float:
    """The exponential of the mean loss of a character."""
    return math.exp(measured["loss"])


def correlation(rows: Rows, kind: str, after: str, what: str) -> float:
    """The rank correlation of a score with what closing a unit does."""
    return float(spearmanr([r["scores"][kind] for r in rows], [r[after][what] for r in rows]).statistic)


def ranks(content: Mapping[str, Any]) -> list[str]:
    """The rank correlations of each score: over all sites, and the mean over sites of those within."""
    cells = []
    for (name,), rows in grouped(content["results"], "network").items():
        sites = [found for found in grouped(rows, "site").values() if len(found) >= LEAST]
        for kind in rows[0]["scores"]:
            found = [f"{TITLES[name]} ({len(rows)} units, {len(sites)} sites)", kind]
            for what in ("loss", "divergence"):
                for after in ("closed", "repaired"):
                    within = [correlation(r, kind, after, what) for r in sites]
                    found.append(f"{fmean(within):.2f}" if within else "")
                    found.append(f"{correlation(rows, kind, after, what):.2f}")
            cells.append(found)
    columns = [
        f"{what}{after}, {where}" for what in ("loss", "divergence") for after in ("", " after repair")
        for where in ("within sites", "all sites")
    ]  # fmt: skip
    return table(["network", "scores", *columns], cells)


def latency(content: Mapping[str, Any]) -> list[str]:
    """The ratio of times beside that of the multiply-adds, over the runs."""
    cells = []
    for (name, multiple, batch), rows in grouped(content["results"], "network", "multiple_of", "batch").items():
        before, after = rows[0]["macs"]
        cells.append(
            [
                f"{TITLES[name].split(',')[0]}, batch {batch}", f"{multiple}", f"{after / before:.3f}",
                spread([r["milliseconds"][1] / r["milliseconds"][0] for r in rows], 3),
                *(spread([r["milliseconds"][i] for r in rows]) for i in (0, 1)), f"{max(r['load'] for r in rows):.1f}",
            ]
        )  # fmt: skip
    header = [
        "network", "widths are multiples of", "multiply-adds, cut / whole", "time, cut / whole", "whole, ms", "cut, ms",
        "load, at most",
    ]  # fmt: skip
    return table(header, cells)


def starts(content: Mapping[str, Any]) -> list[str]:
    """The rows of gates_from_scores.py: a row for each share and way, over its seeds."""
    cells = []
    for (share, way), rows in grouped(content["results"], "share", "way").items():
        lost = [r["accuracy"] - r["dense"] for r in rows]
        figures = [spread([r["accuracy"] for r in rows], 2), spread(lost, 2), spread([r["seconds"] for r in rows], 0)]
        cells.append([f"{share:.0%}", way, str(len(rows)), *figures])
    return table(["share", "way", "seeds", "accuracy, %", "to the whole network", "CPU s"], cells)


def large(content: Mapping[str, Any]) -> list[str]:
    """The rows of large.py: a row for each size."""
    parts = ("attach", "scores", "cut", "repair", "rest", "all")
    cells = []
    for row in sorted(content["results"], key=lambda r: r["parameters"]):
        mib, million = row["mib"], 1e6
        cells.append(
            [
                row["size"], *(f"{row[n] / million:,.0f}" for n in ("parameters", "parameters after")),
                *(f"{row['cpu_seconds'][part]:,.0f}" for part in parts),
                *(f"{mib[n] / 1024:.2f}" for n in ("peak", "over the model")),
                *(f"{mib['by part'][part] / 1024:.2f}" for part in ("attach", "scores", "repair")),
                *(f"{row['error'][step]:.3g}" for step in ("cut", "repaired")), f"{row['load']:.1f}",
            ]
        )  # fmt: skip
    header = [
        "size", "parameters, millions", "after", "CPU s, attach", "scores", "cut", "repair", "rest", "all",
        "peak, GiB", "over the model", "in attach", "in scores", "in repair", "error, cut", "repaired", "load",
    ]  # fmt: skip
    return table(header, cells)


def parts(content: Mapping[str, Any]) -> list[str]:
    """The rows of shrink_ablation.py: a row for each way, over its seeds, with the shares side by side.

    Ways that differ in their training only have the same cut for a seed, so what is known at once of one is of all.
    """
    results = content["results"]
    shares, seeds = sorted({r["share"] for r in results}, reverse=True), sorted({r["seed"] for r in results})
    cuts = {way: replace(parts_of, training="") for way, parts_of in WAYS.items()}

    def cell(values: Mapping[int, float], digits: int = 1) -> str:
        fewer = f" ({len(values)})" if len(values) < len(seeds) else ""
        return f"{spread(list(values.values()), digits)}{fewer}" if values else ""

    def cells(way: str, share: float) -> list[str]:
        some = [r for r in results if r["share"] == share]
        same = [r for r in some if "at once" in r and cuts[r["way"]] == cuts.get(way)]
        own = [r for r in some if r["way"] == way]
        seconds = [r["after" if "after" in r else "at once"]["seconds"] for r in own]
        return [
            cell({r["seed"]: r["at once"]["accuracy"] for r in same}),
            cell({r["seed"]: r["after"]["accuracy"] for r in own if "after" in r}),
            f"{fmean(seconds):.0f}" if seconds else "",
        ]

    ways = [way for way in (*WAYS, *GATES) if any(r["way"] == way for r in results)]
    rows = [[way, *(c for share in shares for c in cells(way, share))] for way in ways]
    header = [f"{share:.0%}, {what}" for share in shares for what in ("at once", "after", "CPU s")]
    whole = spread([next(r["dense"] for r in results if r["seed"] == seed) for seed in seeds], 1)
    return [*table(["way", *header], rows), "", f"The whole network: {whole} %, over {len(seeds)} seeds."]


def cifar(content: Mapping[str, Any]) -> list[str]:
    """The rows of cifar_cut.py: a row for each network, over its seeds, with further epochs in columns."""
    results = content["results"]
    further = sorted({r["epochs"] for r in results})
    ways = ("dense", "cut", "re-estimated", "repaired")
    order = sorted(results, key=lambda r: (r["depth"], -r["share"], ways.index(r["network"])))
    cells = []
    for (depth, share, network), rows in grouped(order, "depth", "share", "network").items():
        found = [[r for r in rows if r["epochs"] == n] for n in further]
        seconds = [sum(r["seconds"].values()) for r in found[0] if "seconds" in r]
        cells.append(
            [
                f"ResNet-{depth}, {share:.0%}", network,
                *(f"{spread([r['accuracy'] for r in some])} ({len(some)})" if some else "" for some in found),
                f"{fmean(seconds):.0f}" if seconds and network != "dense" else "",
            ]
        )  # fmt: skip
    names = ["at once", *(f"after {n} epoch{'s' if n > 1 else ''}" for n in further[1:])]
    return table(["network, share", "way", *names, "CPU s, scores, cut and repair"], cells)


def recurrent(content: Mapping[str, Any]) -> list[str]:
    """The rows of recurrent_layers.py: a row for each share and way, over its seeds."""
    ordered = sorted(content["results"], key=lambda r: (-r["share"], r["way"] != "tied"))
    cells = []
    for (share, way), rows in grouped(ordered, "share", "way").items():
        figures = [spread([100 * r["accuracy"][step] for r in rows]) for step in ("whole", "repaired", "imitated")]
        widths = ["-".join(f"{fmean(layer):.0f}" for layer in zip(*(r["widths"] for r in rows), strict=True))]
        cells.append([f"{share:.0%}", way, str(len(rows)), *figures, *widths])
    header = ["share", "layers", "seeds", "accuracy, %, whole", "cut and repaired", "after imitation", "mean widths"]
    return table(header, cells)


PARTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]]]] = {
    "cifar": ("cifar_cut", cifar),
    "one-shot": ("repair", one_shot),
    "transformers": ("transformers_cut", transformers),
    "parts": ("shrink_ablation", parts),
    "starts": ("gates_from_scores", starts),
    "ranks": ("score_ranks", ranks),
    "latency": ("shrink_latency", latency),
    "large": ("large", large),
    "recurrent": ("recurrent_layers", recurrent),
}


def main() -> int:
    """Fill the page; or compare with --check."""
    text = PAGE.read_text()
    for name, (path, make) in PARTS.items():
        content = json.loads((RESULTS / f"{path}.json").read_text())
        text = between(text, name, "\n".join([*make(content), "", how(content)]))
    return publish({PAGE: text})


if __name__ == "__main__":
    sys.exit(main())
