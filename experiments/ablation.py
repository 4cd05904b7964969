"""What each idea brings: LeNet-5 on 10,000 MNIST images, from the paper's estimator and pressure to the defaults.

Two lists of runs with the same data, epochs and rates. "ideas" adds one idea after the other, at one strength of the
pressure; the linear one has the slope that the logarithmic one has at the beginning. "estimators" exchanges
the estimator alone, under a budget, so that all end at the same size.

About 40 minutes on one core: python experiments/ablation.py --data-dir DIR. Writes results/ablation.json after
every run, and goes on from there.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import environment, write, written

import plasticnet as pn
from plasticnet.apps.data import Data, Split, load_data
from plasticnet.apps.loop import train_epoch
from plasticnet.apps.models import LeNet5
from plasticnet.apps.preparing import Training
from plasticnet.apps.scores import evaluate
from plasticnet.apps.settings import Config

IMAGES, FIRST, PLASTIC, LAST, DECAY = 10_000, 2, 12, 6, 6
PENALTY, LR, GATE_LR, K, K_END, BUDGET = 0.1, 1e-3, 4e-2, 7.0, 28.0, 0.08


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str
    estimator: str = "bitflip-cv"
    gates: Literal["sample", "batch"] = "sample"
    scale: Literal["linear", "log"] = "log"
    k_end: float = K
    budget: float | None = None  # share of the MACs


IDEAS = [
    Variant("ARM, one draw per batch, linear pressure (the paper)", "arm", "batch", "linear"),
    Variant("+ a draw per sample", "arm", "sample", "linear"),
    Variant("+ DisARM", "disarm", "sample", "linear"),
    Variant("+ control variate (bitflip-cv)", "bitflip-cv", "sample", "linear"),
    Variant("+ logarithmic pressure"),
    Variant("+ rising k", k_end=K_END),
]
NAMES = ["arm", "disarm", "disarm-cv", "disarm-mean", "bitflip-cv", "straight-through"]
ESTIMATORS = [Variant("arm, per batch", "arm", "batch", budget=BUDGET)]
ESTIMATORS += [Variant(f"{name}, per sample", name, budget=BUDGET) for name in NAMES]


def run(variant: Variant, data: Data, seed: int) -> dict[str, Any]:
    """Train one network to its end."""
    torch.manual_seed(seed)
    net = pn.PlasticNet(LeNet5(), (data.train.x[:2],), estimator=variant.estimator, gates=variant.gates)
    optimizer = torch.optim.Adam(net.param_groups(LR, GATE_LR))
    stages = [pn.Stage(FIRST), pn.Stage(PLASTIC, K, k_end=variant.k_end), pn.Stage(LAST)]
    budget = None if variant.budget is None else pn.Budget(macs=variant.budget)
    whole = None if variant.scale == "log" else net
    pressure = None if budget is not None else pn.Pressure(PENALTY, "macs", variant.scale, relative_to=whole)
    schedule = pn.Schedule(net, optimizer, stages, pressure=pressure, budget=budget)
    started, history = time.process_time(), []
    for epoch in range(schedule.epochs):
        for group, rate in zip(optimizer.param_groups, (LR, GATE_LR), strict=True):
            group["lr"] = rate * min(1.0, (schedule.epochs - epoch) / DECAY) if math.isinf(net.k) else rate
        train_epoch(Training(net, optimizer, schedule), data.train, Config())
        change = schedule.step()
        size = net.summary()
        history.append({"parameters": size.open_parameters, "macs": size.open_macs, "transition": change.transition})
    seconds = time.process_time() - started
    size = net.summary()
    return {
        "units": [s.open for s in size.sites], "parameters": size.open_parameters, "macs": size.open_macs,
        "val_accuracy": evaluate(net, data.val)[1], "test_accuracy": evaluate(net.compact(), data.test)[1],
        "cpu_seconds": seconds, "history": history,
    }  # fmt: skip


def job(part: str, variant: Variant, seed: int, folder: str) -> dict[str, Any]:
    """One run in a process of its own."""
    torch.set_num_threads(1)
    data = load_data("mnist", Path(folder), seed)
    data = Data(Split(data.train.x[:IMAGES], data.train.y[:IMAGES]), data.val, data.test)
    commit = environment()["commit"]  # of the code that is loaded
    result = {"part": part, "variant": variant.name, "seed": seed, "commit": commit, **run(variant, data, seed)}
    print({k: v for k, v in result.items() if k != "history"}, flush=True)
    return result


def main() -> None:
    """All variants and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    results = written("ablation")
    there = {(r["part"], r["variant"], r["seed"]) for r in results}
    settings = {
        "images": IMAGES, "stages": [FIRST, PLASTIC, LAST], "decay": DECAY, "penalty": PENALTY, "lr": LR,
        "gate_lr": GATE_LR, "k": K, "k_end": K_END, "budget": BUDGET, "batch": Config().batch, "jobs": options.jobs,
    }  # fmt: skip
    sys.argv = ["ablation.py", "--data-dir", "DIR", "--seeds", *map(str, options.seeds), "--jobs", str(options.jobs)]
    torch.set_num_threads(1)
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = [
            pool.submit(job, part, v, seed, options.data_dir)
            for seed in options.seeds
            for part, v in _ALL
            if (part, v.name, seed) not in there
        ]
        for done in as_completed(runs):
            results.append(done.result())
            order = {(p, v.name): i for i, (p, v) in enumerate(_ALL)}
            results.sort(key=lambda r: (order[r["part"], r["variant"]], r["seed"]))
            write("ablation", settings, results)


_ALL = [*(("ideas", v) for v in IDEAS), *(("estimators", v) for v in ESTIMATORS)]


if __name__ == "__main__":
    main()
