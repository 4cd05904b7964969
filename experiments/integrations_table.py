"""Write the table of docs/integrations.md from the committed results; with --check only compare it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, between, publish
from gates_table import grouped, table

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"


def outcome(rows: list[dict[str, Any]]) -> str:
    """How many of the cases of a check have passed, and why others were skipped."""
    ran = [r for r in rows if r["passed"] is not None]
    skipped = sorted({r["skipped"].removeprefix("Skipped: ") for r in rows if r["passed"] is None})
    passed = sum(r["passed"] for r in ran)
    parts = ["passed" if passed == len(ran) else f"**{len(ran) - passed} of {len(ran)} failed**"] if ran else []
    return "; ".join([*parts, *(f"not run: {reason}" for reason in skipped)])


def main() -> int:
    """Write the table, or compare it."""
    content = json.loads((RESULTS / "integrations.json").read_text())
    cells = []
    for (integration, processes, _), rows in grouped(
        [{**r, "function": r["test"].partition("[")[0]} for r in content["results"]],
        "integration", "processes", "function",
    ).items():  # fmt: skip
        cells.append(
            [
                integration, str(processes), rows[0]["check"], str(len(rows)), outcome(rows),
                f"{sum(r['seconds'] for r in rows):.0f}", max(r["date"] for r in rows), rows[0]["function"],
            ]
        )  # fmt: skip
    header = ["integration", "processes", "what is checked", "cases", "outcome", "seconds", "date", "test"]
    found = {n: v for r in content["results"] for n, v in r["versions"].items()}
    e = content["environment"]
    note = f"{', '.join(f'{n} {v}' for n, v in sorted(found.items()))}; {e['device']}, {e['threads']} thread."
    text = between(PAGE.read_text(), "table", "\n".join([*table(header, cells), "", note]))
    return publish({PAGE: text})


if __name__ == "__main__":
    sys.exit(main())
