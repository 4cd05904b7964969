"""Write the tables on compiled runs of docs/cost.md from what compiled.py measured; --check only says whether they are
up to date."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cost_table import PAGE, table, verdict

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
from common import between, publish  # noqa: E402

Rows = Sequence[Mapping[str, Any]]
LIMIT = 1.05  # what a compiled run over one as written must reach: no loss, beside what chance moves


def runs(rows: Rows) -> list[str]:
    """Whole prunings with `net.compile()` over those as written."""
    of = {(r["network"], r["seed"], r["way"]): r for r in rows}
    cells = []
    for (network, seed, way), row in of.items():
        if way != "compiled":
            continue
        other = of[network, seed, "as written"]
        cpu, wall = (row[unit] / other[unit] for unit in ("cpu_seconds", "wall_seconds"))
        loads = [r[key] for r in (other, row) for key in ("load_before", "load_after")]
        cells.append(
            [
                f"{network}, seed {seed}", f"{cpu:.3f}", *verdict(cpu, LIMIT), f"{wall:.3f}",
                *(f"{r[unit]:.0f}" for unit in ("cpu_seconds", "wall_seconds") for r in (row, other)),
                f"{row['share_of_macs']:.3f}, {other['share_of_macs']:.3f}",
                f"{min(loads):.1f} to {max(loads):.1f}",
            ]
        )  # fmt: skip
    header = [
        "pruning", "CPU time over as written", "must reach", "", "on the clock", "CPU s", "as written, CPU s",
        "s on the clock", "as written, s", "share of the MACs left", "load",
    ]  # fmt: skip
    return table(header, cells)


def steps(rows: Rows) -> list[str]:
    """What compiling takes and saves, and after how many minutes it is won back."""
    cells = []
    for row in (r for r in rows if r["way"] == "steps"):
        for kind, found in row["kinds"].items():
            written, compiled, cost = found["written_ms"], found["compiled_ms"], found["compiling_seconds"]
            saving = 1 - compiled / written
            back = f"{cost / saving / 60:,.1f}" if saving > 0 else "never"
            cells.append(
                [
                    f"{row['network']}, {kind}", f"{written:.1f}", f"{compiled:.1f}", f"{100 * saving:.0f}",
                    f"{cost:.0f}", back,
                ]
            )  # fmt: skip
    header = [
        "step", "as written, ms", "compiled, ms", "saved, %", "compiling, s", "minutes as written that win it back",
    ]  # fmt: skip
    return table(header, cells)


def main() -> int:
    """Replace what stands between the markers, or compare it with --check."""
    content = json.loads((HERE / "results" / "compiled.json").read_text())
    e, rows = content["environment"], content["results"]
    dates, commits = (" and ".join(sorted({r[key] for r in rows})) for key in ("date", "commit"))
    seeds = len({r["seed"] for r in rows})
    note = (
        f"`{e['command']}`: torch {e['torch']}, {e['threads']} thread, {e['device']}, {dates}, commit {commits}; "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds'}."
    )
    return publish({PAGE: between(PAGE.read_text(), "compiled", "\n".join([*runs(rows), "", *steps(rows), "", note]))})


if __name__ == "__main__":
    sys.exit(main())
