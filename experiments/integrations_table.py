"""Write the tables of docs/integrations.md from the committed results; with --check only compare them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from common import RESULTS, between, publish, spread
from gates_table import grouped, table

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"


def outcome(rows: list[dict[str, Any]]) -> str:
    """How many of the cases of a check have passed, and why others were skipped."""
    ran = [r for r in rows if r["passed"] is not None]
    skipped = sorted({r["skipped"].removeprefix("Skipped: ") for r in rows if r["passed"] is None})
    passed = sum(r["passed"] for r in ran)
    parts = ["passed" if passed == len(ran) else f"**{len(ran) - passed} of {len(ran)} failed**"] if ran else []
    return "; ".join([*parts, *(f"not run: {reason}" for reason in skipped)])


def examples() -> str:
    """What the examples have found: a row for each network."""
    content = json.loads((RESULTS / "in_trainers.json").read_text())
    cells = []
    for (network,), rows in grouped(content["results"], "network").items():
        macs = f"{rows[0]['macs before']:,}", spread([r["macs after"] for r in rows], 0)
        found = [spread([r[when] for r in rows], 1) for when in ("before", "after")]
        cells.append([network, str(len(rows)), *macs, *found, f"{mean(r['CPU seconds'] for r in rows):.0f}"])
    header = ["network", "seeds", "multiply-adds before", "after", "accuracy before, %", "after, %", "CPU s"]
    e = content["environment"]
    note = f"`{e['command']}`: torch {e['torch']}, {e['threads']} thread, {e['device']}, {e['date']}, {e['commit']}."
    return "\n".join([*table(header, cells), "", note])


def main() -> int:
    """Write the tables, or compare them."""
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
    return publish({PAGE: between(text, "examples", examples())})


if __name__ == "__main__":
    sys.exit(main())
