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
    "price of a parameter", "way", "seeds", "units", "parameters", "peak over end", "accuracy, %", "validation loss",
    "training loss", "CPU s", "of them for offers",
)  # fmt: skip


def line(price: float, way: str, begin: str, rows: Rows) -> list[str]:
    """The row of one way at one price."""
    widths = zip(*(r["units"].values() for r in rows), strict=True)
    return [
        f"{price:g}",
        f"{way} from {begin}",
        str(len(rows)),
        ", ".join(spread([float(n) for n in site], 1) for site in widths),
        spread([r["parameters"] for r in rows], 0),
        f"{fmean(r['peak'] / r['parameters'] for r in rows):.2f}",
        *(spread([r[key] for r in rows], n) for key, n in (("accuracy", 2), ("validation loss", 3))),
        spread([r["training loss"] for r in rows], 4),
        *(f"{fmean(r['seconds'][part] for r in rows):.1f}" for part in ("all", "offers")),
    ]


def main() -> int:
    """Write the table, or compare it."""
    content = json.loads((RESULTS / "growth_price.json").read_text())
    of = grouped(sorted(content["results"], key=lambda r: r["price"]), "price", "way", "from")
    lines = table(HEADER, [line(*key, rows) for key, rows in of.items()])
    text = "\n".join([*lines, "", how(content["environment"])])
    return publish({PAGE: between(PAGE.read_text(), "price", text)})


if __name__ == "__main__":
    sys.exit(main())
