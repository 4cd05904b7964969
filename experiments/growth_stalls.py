"""Whether growth from one unit a site ever stalls: twenty seeds each on the digits and on the moons.

The digits are grown as in growth_price.py, and the moons as in moons.py, with gates on the inputs, too. Networks pruned
at the same prices are in the results of these two scripts. It takes ten minutes on one core: python
experiments/growth_stalls.py. Writes results/growth_stalls.json; what is there is not run again, unless it was grown by
another rule.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import growth_price
import torch
from growth_rows import path, row
from growth_tasks import Task, task
from moons import CONFIG

from plasticnet.apps.data import load_data
from plasticnet.apps.loop import train_run
from plasticnet.apps.models import MLP
from plasticnet.apps.settings import Config

NAME, START = "growth_stalls", 1
ROWS = 400  # of the moons, for training


def moons(seed: int, config: Config = CONFIG) -> dict[str, Any]:
    """One run on the moons of a seed."""
    config = Config(**{**asdict(config), "seed": seed, "start": START})
    torch.manual_seed(seed)
    history: list[dict[str, Any]] = []
    data = load_data("moons", seed=seed)
    end = train_run(MLP([100, 80, 2]), data, config, "grow", on_epoch=history.append).summary
    return {
        "units": end["units"], "parameters": end["parameters"], "peak": end["peak_parameters"],
        "test": 100 * (1 - end["test_score"]), "seconds": end["train_cpu_seconds"],
        "widths": path(["-".join(map(str, r["units"].values())) for r in history]),
    }  # fmt: skip


def digits(seed: int, chosen: Task) -> dict[str, Any]:
    """One run on the digits."""
    end = growth_price.run(chosen, "grown", START, chosen.price, seed)
    keys = ("units", "parameters", "test", "seconds")
    return {**{k: end[k] for k in keys}, "peak": end["peak"]["parameters"], "widths": path(end["widths"].split())}


def main() -> None:
    """Both tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", default=["digits", "moons"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = task("digits", None)
    prices = {"digits": chosen.price, "moons": CONFIG.price / ROWS}
    settings = {"start": START, "prices": prices, "gate rate": growth_price.GATE_RATE, "k": growth_price.K}
    for name in options.tasks:
        for seed in range(options.seeds):

            def run(name: str = name, seed: int = seed) -> dict[str, Any]:
                return digits(seed, chosen) if name == "digits" else moons(seed)

            row(NAME, {**settings, "moons": asdict(CONFIG)}, {"task": name, "seed": seed}, run, grows=True)


if __name__ == "__main__":
    main()
