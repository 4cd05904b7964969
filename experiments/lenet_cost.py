"""What whole runs cost: LeNet-5 on MNIST, 30 epochs each of dense, pruned and grown training, three seeds.

The three runs of a seed take turns, an epoch each, in one process with one thread, so that a slow minute of the
machine meets all of them; their process CPU time is compared. All see the same data and the same learning rate,
which falls linearly to 0 over the last 12 epochs. The test set is read once, at the end of a run.

About 17 minutes a seed: python experiments/lenet_cost.py --data-dir DIR. Adds the rows of a seed to
results/lenet_cost.json when it is done, and goes on from there.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import known, write, written

import plasticnet as pn
from plasticnet.apps.data import Data, Split, load_data
from plasticnet.apps.loop import train_epoch
from plasticnet.apps.models import LeNet5
from plasticnet.apps.preparing import Training
from plasticnet.apps.scores import evaluate
from plasticnet.apps.settings import Config

EPOCHS, DECAY, PERIODS = 30, 12, 2  # schedule.step is called PERIODS times an epoch
LR = {"dense": (1e-3, 1e-3), "prune": (1e-3, 4e-2), "grow": (1e-3, 2e-2)}  # of weights and of gates
PENALTY = {"prune": 0.1, "grow": 0.008}  # on the logarithm of the multiply-adds
PLASTIC = {"dense": (0, 0), "prune": (1, 12), "grow": (0, 9)}  # epochs
START = 3  # units per site


def run(mode: str, data: Data, seed: int) -> Iterator[dict[str, Any]]:
    """One training run; yields after every epoch, and at the end the result. Keeps its own random numbers."""
    torch.manual_seed(seed)
    net = pn.PlasticNet(LeNet5(), (data.train.x[:2],))
    if mode == "grow":
        pn.narrow(net, START)
    rates = LR[mode]
    optimizer = torch.optim.Adam(net.param_groups(*rates))

    begin, end = PLASTIC[mode]
    stages = [pn.Stage(begin * PERIODS), pn.Stage((end - begin) * PERIODS, 7.0), pn.Stage((EPOCHS - end) * PERIODS)]
    growth = pn.Growth() if mode == "grow" else None
    pressure = pn.Pressure(PENALTY.get(mode, 0.0), cost="macs", scale="log")
    schedule = pn.Schedule(net, optimizer, stages, growth=growth, pressure=pressure)
    history: list[dict[str, Any]] = []
    random = torch.get_rng_state()
    while schedule.epoch < schedule.epochs:
        torch.set_rng_state(random)
        started, k = time.process_time(), net.k
        for part in torch.randperm(len(data.train)).chunk(PERIODS):
            train_epoch(Training(net, optimizer, schedule), Split(data.train.x[part], data.train.y[part]), Config())
            val_loss, val_accuracy = evaluate(net, data.val)
            schedule.step(val_loss)
            left = min(1.0, (schedule.epochs - schedule.epoch) / (DECAY * PERIODS))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * left
        seconds = time.process_time() - started
        size = net.summary()
        history.append(
            {
                "k": "inf" if math.isinf(k) else k,
                "val_accuracy": val_accuracy,
                "units": [s.open for s in size.sites],
                "parameters": size.open_parameters,
                "macs": size.open_macs,
                "cpu_seconds": seconds,
            }
        )
        random = torch.get_rng_state()
        yield {"mode": mode, "epoch": len(history), **history[-1]}
    _, accuracy = evaluate(net.compact(), data.test)
    last = history[-1]
    result = {
        "mode": mode,
        "seed": seed,
        "test_accuracy": accuracy,
        **{k: last[k] for k in ("units", "parameters", "macs")},
    }
    result |= {f"peak_{what}": max(h[what] for h in history) for what in ("parameters", "macs")}
    result |= {"cpu_seconds": sum(h["cpu_seconds"] for h in history), "history": history}
    yield result if growth is None else {**result, "growth_stopped": growth.stopped}


def one_seed(seed: int, folder: str) -> list[dict[str, Any]]:
    """The three runs, by turns."""
    torch.set_num_threads(1)
    data = load_data("mnist", Path(folder), seed)
    results = []
    for found in zip(*(run(mode, data, seed) for mode in PLASTIC), strict=True):
        results = list(found)
        line = [f"{r['mode']} {r['macs']:,} {r['cpu_seconds']:.0f} s" for r in results]
        print(seed, results[0].get("epoch", "end"), *line, sep="  ", flush=True)
    return results


def main() -> None:
    """Every seed in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    settings = {
        "epochs": EPOCHS, "decay": DECAY, "periods": PERIODS, "rates": LR, "penalty": PENALTY, "plastic": PLASTIC,
        "start": START, "batch": 128, "jobs": arguments.jobs,
    }  # fmt: skip
    sys.argv = [sys.argv[0], "--data-dir", "DIR", "--seeds", *map(str, arguments.seeds), "--jobs", str(arguments.jobs)]
    torch.set_num_threads(1)
    left = [seed for seed in arguments.seeds if not known("lenet_cost", seed=seed)]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for results in pool.map(one_seed, left, [arguments.data_dir] * len(left)):
            write("lenet_cost", settings, [*written("lenet_cost"), *results])


if __name__ == "__main__":
    main()
