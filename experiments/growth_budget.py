"""Growing and pruning to the same number of parameters, with `pn.Budget`.

The budget is what pruning at the linear price has ended with in growth_price.py (its mean over the seeds). Networks,
data, epochs and rates are those of that script. It takes five minutes on one core: python experiments/growth_budget.py
--data-dir DIR. Writes results/growth_budget.json; what is there is not run again, unless it was grown by another rule.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import growth_price
import torch
from common import written
from growth_rows import path, row
from growth_tasks import Task, task

import plasticnet as pn

NAME, START = "growth_budget", 3


def budget(name: str, price: float) -> int:
    """The parameters that pruning at a price has ended with."""
    rows = [r for r in written("growth_price") if (r["task"], r["way"], r["price"]) == (name, "pruned", price)]
    return round(fmean(r["parameters"] for r in rows))


def run(task: Task, way: str, seed: int, most: int) -> dict[str, Any]:
    """One run."""
    end = growth_price.run(task, way, START if way == "grown" else None, pn.Budget(params=most), seed)
    return {**end, "widths": path(end["widths"].split())}


def main() -> None:
    """Both ways on all tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "adult", "housing"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "start": START, "gate rate": growth_price.GATE_RATE, "k": growth_price.K,
        "epochs before the pressure": growth_price.BEFORE,
    }  # fmt: skip
    for name in options.tasks:
        chosen = task(name, options.data_dir)
        most = budget(name, chosen.price)
        for seed in range(options.seeds):
            for way in ("pruned", "grown"):
                key = {"task": name, "seed": seed, "way": way, "budget": most}
                row(NAME, settings, key, partial(run, chosen, way, seed, most), grows=way == "grown")


if __name__ == "__main__":
    main()
