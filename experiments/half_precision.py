"""Half precision: the whole training step under autocast, in bfloat16, and in float16 with a scaled loss.

An MLP and a small convolutional network on the 8x8 digits, with a budget of multiply-adds, in each precision with the
same seeds. Only the forward pass and the penalty run under autocast, as PyTorch advises; the compact network is tested
in single precision. About 10 minutes on one core. Writes results/half_precision.json after each run, and goes on from
what is there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, write, written
from torch import Tensor, nn

from plasticnet import Budget, PlasticNet, Schedule, Stage
from plasticnet.apps.data import Data, load_data
from plasticnet.apps.models import MLP
from plasticnet.apps.scores import evaluate

SETTINGS = {"lr": 2e-3, "batch": 32, "first": 3, "plastic": 18, "last": 7, "k": 7.0, "macs": 0.3, "split": 0}
SEEDS = range(5)
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convolutional() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 256-128": lambda: MLP([64, 256, 128, 10]),
    "convolutional": convolutional,
}


def run(make: Callable[[], nn.Module], data: Data, dtype: torch.dtype | None, seed: int) -> dict[str, Any]:
    """Train one network, and return what is recorded of it."""
    s, started = SETTINGS, time.process_time()
    torch.manual_seed(seed)
    net = PlasticNet(make(), (data.train.x[:2],))
    optimizer = torch.optim.Adam(net.param_groups(s["lr"]))
    stages = [Stage(s["first"]), Stage(s["plastic"], k=s["k"]), Stage(s["last"])]
    schedule = Schedule(net, optimizer, stages, budget=Budget(macs=s["macs"]))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    skipped = 0
    for _ in range(schedule.epochs):
        net.train()
        for index in torch.randperm(len(data.train)).split(s["batch"]):
            x, y = data.train.x[index], data.train.y[index]

            def losses(x: Tensor = x, y: Tensor = y) -> Tensor:
                return F.cross_entropy(net(x), y, reduction="none")

            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = net.expected_loss(losses) + schedule.penalty()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            skipped += scaler.get_scale() < before
        schedule.step(evaluate(net, data.val)[0])
    loss, accuracy = evaluate(net.compact(), data.test)
    summary = net.summary()
    return {
        "target": schedule.force.targets["macs"], "reached": summary.open_macs,
        "parameters": summary.open_parameters, "test_accuracy": accuracy, "test_loss": loss,
        "val_loss": evaluate(net, data.val)[0], "skipped": skipped,
        "units": [len(site) for site in net.sites.values()], "cpu_seconds": round(time.process_time() - started, 1),
        "finite": all(math.isfinite(float(p.abs().sum())) for p in net.parameters()),
    }  # fmt: skip


def main() -> None:
    """All networks, precisions and seeds that are not there yet."""
    torch.set_num_threads(1)
    data, commit = load_data("digits", seed=SETTINGS["split"]), environment()["commit"]
    results = written("half_precision")
    done = {(r["network"], r["precision"], r["seed"]) for r in results}
    for seed in SEEDS:
        for network, make in NETWORKS.items():
            for precision, dtype in PRECISIONS.items():
                if (network, precision, seed) not in done:
                    row = {"network": network, "precision": precision, "seed": seed, "commit": commit}
                    results.append({**row, **run(make, data, dtype, seed)})
                    print(results[-1], flush=True)
                    write("half_precision", {**SETTINGS, "seeds": list(SEEDS)}, results)


if __name__ == "__main__":
    main()
