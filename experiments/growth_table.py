"""Write the table of docs/design/growth.md from growth_price.json; --check only says whether it is up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

from common import RESULTS, between, how, publish, spread
from gates_table import Rows, grouped, table

PAGE = Path(__file__).parent.parent / "docs" / "design" / "growth.md"
HEADER = (
    "task", "price of a parameter", "way", "seeds", "units", "parameters", "peak over end", "error", "CPU s",
    "of dense",
)  # fmt: skip
ORDER = ("dense", "pruned", "grown", "known")


def line(key: tuple[str, float | None, str, int | None], rows: Rows, dense: Rows) -> list[str]:
    """The row of one way at one price."""
    task, price, way, start = key
    widths = zip(*(r["units"].values() for r in rows), strict=True)
    seconds = fmean(r["seconds"] for r in rows)
    return [
        task,
        "" if price is None else f"{price:.0e}",
        f"grown from {start} a site" if start else way,
        str(len(rows)),
        ", ".join(spread([float(n) for n in site], 1) for site in widths),
        spread([r["parameters"] for r in rows], 0),
        f"{fmean(r['peak']['parameters'] / r['parameters'] for r in rows):.2f}" if way == "grown" else "",
        spread([r["test"] for r in rows], 3 if task == "housing" else 2),
        f"{seconds:.1f}",
        f"{seconds / fmean(r['seconds'] for r in dense):.2f}",
    ]


def main() -> int:
    """Write the table, or compare it."""
    content = json.loads((RESULTS / "growth_price.json").read_text())
    tasks = list(dict.fromkeys(r["task"] for r in content["results"]))
    rows = sorted(
        content["results"],
        key=lambda r: (tasks.index(r["task"]), r["price"] or 0, ORDER.index(r["way"]), r["start"] or 0),
    )
    of = grouped(rows, "task", "price", "way", "start")
    dense = {key[0]: part for key, part in of.items() if key[2] == "dense"}
    lines = table(HEADER, [line(key, part, dense[key[0]]) for key, part in of.items()])
    note = "The error is that on the test data: percent wrong, or the mean squared error (housing)."
    text = "\n".join([*lines, "", note, "", how(content["environment"])])
    return publish({PAGE: between(PAGE.read_text(), "price", text)})


if __name__ == "__main__":
    sys.exit(main())
