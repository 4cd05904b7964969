"""Write docs/packages.md from results/packages.json and packages_attempts.json.

With --check it only says whether the page is up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import RESULTS, between, how, publish

PAGE = Path(__file__).parent.parent / "docs" / "packages.md"
TITLES = {
    "repair": "`pn.shrink`",
    "gate": "gates, no repair",
    "magnitude": "magnitude, no repair",
    "torch-pruning": "torch-pruning",
}
OTHERS = ("gate", "magnitude", "torch-pruning")
Row = Mapping[str, Any]


def significant(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.3g}" if value >= 1e-3 else f"{value:.1e}"


def mean_of(
    rows: Sequence[Row], get: Callable[[Row], float | None], write: Callable[[float], str] = significant
) -> str:
    """The mean of a number over rows, with its standard deviation; nothing where no row has it."""
    found = [v for r in rows if "failed" not in r and (v := get(r)) is not None]
    if not found:
        return ""
    return write(fmean(found)) + (f" ± {write(stdev(found))}" if len(found) > 1 else "")


def table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table, whose first column is text."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float], dict[str, list[Row]]]:
    """Rows by model and share, and by method."""
    found: dict[tuple[str, float], dict[str, list[Row]]] = {}
    for r in rows:
        found.setdefault((r["model"], r["share"]), {}).setdefault(r["method"], []).append(r)
    return found


def errors(rows: Sequence[Row]) -> list[str]:
    """Every model at every share in every way."""
    cells = []
    for (model, share), ways in grouped(rows).items():
        for method, title in TITLES.items():
            found = ways.get(method, [])
            if not found:
                continue
            failed = next((r["failed"].replace("|", "/") for r in found if "failed" in r), "")
            variants = sorted({r["variant"] for r in found if r.get("variant") not in (None, "global")})
            name = title + (f" ({'; '.join(variants)})" if variants else "")
            cells.append(
                [
                    f"{model}, {share:.0%}",
                    f"{name}: {failed}" if failed else name,
                    str(len(found)),
                    *(mean_of(found, lambda r, k=k: r["error"].get(k)) for k in ("at once", "repaired", "tuned")),
                    mean_of(found, lambda r: 100 * r["macs"], lambda v: f"{v:.0f}"),
                    mean_of(found, lambda r: r["seconds"]["cut"], lambda v: f"{v:.0f}"),
                    mean_of(found, lambda r: r["seconds"]["tuning"], lambda v: f"{v:.0f}"),
                ]
            )
    header = [
        "model, budget",
        "",
        "seeds",
        "error at once",
        "repaired",
        "fine-tuned",
        "MACs, %",
        "CPU s, cut",
        "tuning",
    ]
    return table(header, cells)


def targets(rows: Sequence[Row]) -> list[str]:
    """How many times smaller the error of `pn.shrink` is than those of the others, and what was to be reached."""
    cells = []
    for (model, share), ways in grouped(rows).items():

        def error(method: str, *steps: str, ways: dict[str, list[Row]] = ways) -> float:
            found = [r["error"][s] for r in ways.get(method, []) if "failed" not in r for s in steps if s in r["error"]]
            return fmean(found) if found else float("inf")

        if len(ways) < 2 or not any("error" in r for r in ways.get("repair", [])):
            continue
        ours, tuned = error("repair", "repaired"), error("repair", "tuned")
        found = [
            (min(error(o, "at once") for o in OTHERS) / ours, 2.0),
            (min(error(o, "tuned") for o in OTHERS) / tuned, 1.25),
            (error("magnitude", "tuned") / tuned, 2.0),
            (error("torch-pruning", "tuned") / tuned, 2.0),
        ]
        texts = [
            "n/a" if ratio == float("inf") else f"{ratio:.2f}" if ratio >= goal else f"**{ratio:.2f}**"
            for ratio, goal in found
        ]
        cells.append([f"{model}, {share:.0%}", *texts])
    header = [
        "model, budget",
        "repaired, at once, against the best of the others: ≥ 2",
        "fine-tuned, against the best of the others: ≥ 1.25",
        "fine-tuned, against magnitude: ≥ 2",
        "fine-tuned, against torch-pruning: ≥ 2",
    ]
    return table(header, cells)


def attempts(rows: Sequence[Row], known: Sequence[Row]) -> list[str]:
    """What was tried for the misses, and how many times smaller its error is than those of the others.

    Args:
        rows: What was tried.
        known: The rows of all ways to cut, of which those with the same seed of the inputs are compared.
    """
    order = list(dict.fromkeys(r["way"] for r in rows))
    cells = []
    for r in sorted(rows, key=lambda r: (r["model"], -r["share"], r["seed"], order.index(r["way"]))):
        same = {
            k["method"]: k["error"]
            for k in known
            if "error" in k and (k["model"], k["share"], k["seed"]) == (r["model"], r["share"], r["seed"])
        }
        own = r["error"] if r["way"] != "default" else {**same.get("repair", {}), **r["error"]}

        def ratio(step: str, others: Sequence[str], by: str, own: Row = own, same: Mapping[str, Row] = same) -> str:
            found = [same[o][by] for o in others if o in same]
            return f"{min(found) / own[step]:.2f}" if found and step in own else ""

        cells.append(
            [
                f"{r['model']}, {r['share']:.0%}, seed {r['seed']}",
                r["way"],
                *(significant(own[k]) if k in own else "" for k in ("held out", "repaired", "tuned")),
                ratio("repaired", OTHERS, "at once"),
                ratio("tuned", OTHERS, "tuned"),
                ratio("tuned", OTHERS[-1:], "tuned"),
                str(r["tries"]),
                f"{r['seconds']:.0f}",
            ]
        )
    header = [
        "model, budget",
        "way",
        "held out",
        "repaired",
        "fine-tuned",
        "repaired, against the best of the others",
        "fine-tuned, against the best",
        "against torch-pruning",
        "repairs",
        "CPU s",
    ]
    return table(header, cells)


def main() -> int:
    """Fill the page, or compare with --check."""
    content = json.loads((RESULTS / "packages.json").read_text())
    rows = sorted(
        content["results"], key=lambda r: (r["model"], -r["share"], list(TITLES).index(r["method"]), r["seed"])
    )
    text = PAGE.read_text()
    for name, make in (("targets", targets), ("errors", errors)):
        text = between(text, name, "\n".join([*make(rows), "", how(content)]))
    tried = json.loads((RESULTS / "packages_attempts.json").read_text())
    lines = [*attempts(tried["results"], content["results"]), "", how(tried)]
    text = between(text, "attempts", "\n".join(lines))
    return publish({PAGE: text})


if __name__ == "__main__":
    sys.exit(main())
