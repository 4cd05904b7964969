"""What each idea brings: LeNet-5 on 20,000 MNIST images, from the paper's estimator and pressure to the defaults.

Two lists of runs with the same data, epochs and rates. "ideas" adds one idea after the other; "estimators"
exchanges the estimator alone, at the default pressure. The linear pressure has the slope that the
logarithmic one has at the beginning. Every run hardens at the end of its plastic stage.

About 50 minutes on one core: python experiments/ablation.py --data-dir DIR. Writes results/ablation.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import write

import plasticnet as pn
from plasticnet.data import Data, Split, load_data
from plasticnet.models import LeNet5
from plasticnet.train import Config, evaluate, train_epoch

IMAGES, FIRST, PLASTIC, LAST, DECAY = 20_000, 2, 12, 6, 6
PENALTY, LR, GATE_LR, K, K_END = 0.1, 1e-3, 4e-2, 7.0, 28.0


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str
    estimator: str = "bitflip-cv"
    gates: Literal["sample", "batch"] = "sample"
    scale: Literal["linear", "log"] = "log"
    k_end: float = K


IDEAS = [
    Variant("ARM, one draw per batch, linear pressure (the paper)", "arm", "batch", "linear"),
    Variant("+ a draw per sample", "arm", "sample", "linear"),
    Variant("+ DisARM", "disarm", "sample", "linear"),
    Variant("+ control variate (bitflip-cv)", "bitflip-cv", "sample", "linear"),
    Variant("+ logarithmic pressure (the defaults)"),
    Variant("+ rising k", k_end=K_END),
]
NAMES = ["arm", "disarm", "disarm-cv", "disarm-mean", "straight-through"]
ESTIMATORS = [Variant(name, name) for name in NAMES]


def run(variant: Variant, data: Data, seed: int) -> dict[str, Any]:
    """Train one network to its end."""
    torch.manual_seed(seed)
    net = pn.PlasticNet(LeNet5(), (data.train.x[:2],), estimator=variant.estimator, gates=variant.gates)
    optimizer = torch.optim.Adam(net.param_groups(LR, GATE_LR))
    stages = [pn.Stage(FIRST), pn.Stage(PLASTIC, K, k_end=variant.k_end), pn.Stage(LAST)]
    schedule = pn.Schedule(net, optimizer, stages)
    full = net.summary().macs
    strength = PENALTY if variant.scale == "log" else PENALTY / full
    config = Config(penalty=strength, cost="macs", scale=variant.scale)
    started, history = time.process_time(), []
    for epoch in range(schedule.epochs):
        for group, rate in zip(optimizer.param_groups, (LR, GATE_LR), strict=True):
            group["lr"] = rate * min(1.0, (schedule.epochs - epoch) / DECAY) if math.isinf(net.k) else rate
        train_epoch(net, optimizer, data.train, config)
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
    result = {"part": part, "variant": variant.name, "seed": seed, **run(variant, data, seed)}
    print({k: v for k, v in result.items() if k != "history"}, flush=True)
    return result


def main() -> None:
    """All variants and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    jobs = [
        (part, v, seed, options.data_dir)
        for seed in options.seeds
        for part, variants in (("ideas", IDEAS), ("estimators", ESTIMATORS))
        for v in variants
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(job, *zip(*jobs, strict=True)))
    settings = {
        "images": IMAGES, "stages": [FIRST, PLASTIC, LAST], "decay": DECAY, "penalty": PENALTY, "lr": LR,
        "gate_lr": GATE_LR, "k": K, "k_end": K_END, "batch": Config().batch, "jobs": options.jobs,
    }  # fmt: skip
    sys.argv = ["ablation.py", "--data-dir", "DIR", "--seeds", *map(str, options.seeds), "--jobs", str(options.jobs)]
    torch.set_num_threads(1)
    write("ablation", settings, results)


if __name__ == "__main__":
    main()
