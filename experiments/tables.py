"""Write the results in docs/results.md from the committed JSON; --check only says whether it is up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from common import RESULTS, between, publish, spread

PAGE = Path(__file__).parent.parent / "docs" / "results.md"


def table(name: str, title: str, script: str) -> str:
    """One experiment: a row per mode, mean ± standard deviation over the seeds."""
    content = json.loads((RESULTS / f"{name}.json").read_text())
    results, env = content["results"], content["environment"]
    modes = list(dict.fromkeys(r["mode"] for r in results))
    seeds = len({r["seed"] for r in results})
    lines = [
        f"**{title}** ({script}; {seeds} seeds, mean ± standard deviation; torch {env['torch']}, "
        f"{env['threads']} thread, {env['device']}, {env['date']})",
        "",
        "| network | test accuracy, % | units per site, by seed | parameters | multiply-adds | training, CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for mode in modes:
        rows = [r for r in results if r["mode"] == mode]
        units = ["-".join(map(str, r["units"].values() if isinstance(r["units"], dict) else r["units"])) for r in rows]
        cells = [
            spread([100 * r["test_accuracy"] for r in rows]),
            ", ".join(units if len(set(units)) > 1 else units[:1]),
            spread([r["parameters"] for r in rows], 0),
            spread([r["macs"] for r in rows], 0),
            spread([r.get("train_cpu_seconds", r.get("cpu_seconds")) for r in rows], 0),
        ]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    lines += ["", *notes(results)]
    return "\n".join(lines)


def notes(results: list[dict]) -> list[str]:
    """What an experiment recorded beyond the columns: the share of the weights that is gone, and growth."""
    found = []
    for mode in dict.fromkeys(r["mode"] for r in results):
        rows = [r for r in results if r["mode"] == mode]
        if "weights_gone" in rows[0]:
            found.append(
                f"Of the 8,160 weights {spread([100 * r['weights_gone'] for r in rows], 1)} % are gone ({mode})."
            )
        if "growth_stopped" in rows[0]:
            stopped = sum(r["growth_stopped"] for r in rows)
            found.append(f"Growth stopped by itself in {stopped} of {len(rows)} runs.")
    return [" ".join(found)] if found else []


def main() -> int:
    """Replace what stands between the markers."""
    parts = [
        table("moons", "Moons, gates on 100 inputs and 80 hidden units", "experiments/moons.py"),
        table("lenet_cost", "LeNet-5 on MNIST, 30 epochs each", "experiments/lenet_cost.py"),
    ]
    text = PAGE.read_text()
    new = between(text, "results", "\n\n".join(parts))
    return publish({PAGE: new})


if __name__ == "__main__":
    sys.exit(main())
