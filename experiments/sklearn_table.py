"""Write the table of docs/how-to/scikit-learn.md from the committed results; with --check only compare it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from common import RESULTS, between, how, publish, spread
from gates_table import grouped, table

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "scikit-learn.md"
ORDER = ("digits", "housing", "adult")


def main() -> int:
    """Fill the page; or compare with --check."""
    content = json.loads((RESULTS / "sklearn_grid.json").read_text())
    rows = sorted(content["results"], key=lambda r: ORDER.index(r["task"]))
    cells = []
    for (task, way), found in grouped(rows, "task", "way").items():
        ours = {r["seed"]: r["seconds"] for r in rows if (r["task"], r["way"]) == (task, "plasticnet")}
        times = [ours[r["seed"]] / r["seconds"] for r in found if r["seed"] in ours]
        cells.append(
            [
                task, way, str(len(found)), spread([100 * r["score"] for r in found]),
                spread([r["parameters"] for r in found], 0), spread([r["seconds"] for r in found], 0),
                f"{median(times):.2f}" if times and way != "plasticnet" else "",
            ]
        )  # fmt: skip
    header = ["task", "way", "seeds", "score, %", "parameters", "CPU s", "time of plasticnet over it"]
    text = "\n".join([*table(header, cells), "", how(content)])
    return publish({PAGE: between(PAGE.read_text(), "grid", text)})


if __name__ == "__main__":
    sys.exit(main())
