"""Write the promise and the table of README.md from the committed results; with --check only compare them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

from common import RESULTS, between, how, publish, spread
from gates_table import grouped, table

ROOT = Path(__file__).parent.parent
PAGE, BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks" / "results"
WAYS, SHARE = ("re-estimated", "repaired"), 0.5


def read(path: Path) -> dict[str, Any]:
    """What a file of results holds."""
    return json.loads(path.read_text())


def promise() -> str:
    """How often the promise was tried, and how often it was kept."""
    models = read(BENCHMARKS / "zoo.json")["results"]
    fine = sum(r.get("status") == "ok" for r in models)
    nothing = sum(r.get("status", "").startswith("nothing to gate") for r in models)
    status = read(BENCHMARKS / "random_networks.json")["counts"]["status"]
    made, refused = sum(status.values()), status.get("refused", 0)
    failed = made - status.get("ok", 0) - refused
    failures = "none failed" if not failed else f"{failed} failed ([which](docs/random.md))"
    wrong = len(models) - fine - nothing
    sentences = [
        f"Of {len(models)} models of torchvision, timm, transformers and others, {fine} are exact, {nothing} have "
        f"nothing to cut, and {wrong or 'none'} is wrong or fails ([docs/zoo.md](docs/zoo.md)).",
        f"Of {made:,} networks that were put together at random, {status.get('ok', 0):,} are exact, {refused} were "
        f"refused with a reason, and {failures}.",
    ]
    return "\n".join(fill(f"- {sentence}", 120, subsequent_indent="  ") for sentence in sentences)


def results() -> str:
    """Trained ResNets at half of their multiply-adds: a row for each network."""
    content = read(RESULTS / "cifar_cut.json")
    rows = [r for r in content["results"] if r["epochs"] == 0]
    dense = {r["depth"]: r["accuracy"] for r in rows if r["network"] == "dense"}
    order = sorted((r for r in rows if r["network"] in WAYS and r["share"] == SHARE), key=lambda r: r["depth"])
    cells = []
    for (depth,), found in grouped(order, "depth").items():
        accuracies = [[r["accuracy"] for r in found if r["network"] == way] for way in WAYS]
        seeds = str(len(accuracies[1]))
        cells.append([f"ResNet-{depth}", f"{SHARE:.0%}", seeds, f"{dense[depth]:.1f}", *map(spread_of, accuracies)])
    header = ["network", "multiply-adds", "seeds", "whole", "cut, BatchNorm estimated anew", "cut and repaired"]
    return "\n".join([*table(header, cells), "", how(content)])


def spread_of(values: list[float]) -> str:
    """The mean and its deviation, if there are values."""
    return spread(values, 1) if values else ""


def main() -> int:
    """Fill the page; or compare with --check."""
    text = PAGE.read_text()
    for name, content in (("promise", promise()), ("results", results())):
        text = between(text, name, content)
    return publish({PAGE: text})


if __name__ == "__main__":
    sys.exit(main())
