"""Budgets met at the first try: MLP, LeNet-5 and ResNet-20, by parameters, MACs and units, with one setting for all.

Digits throughout: 8x8 for the MLP, enlarged to 28x28 for LeNet-5, and to 16x16 with three channels for ResNet-20.
About 20 minutes on one core. Adds rows to results/budgets.json, and goes on from there.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, known, write, written
from torch import Tensor, nn

from plasticnet import Budget, PlasticNet, Schedule, Stage
from plasticnet.apps.data import Data, Split, load_data
from plasticnet.apps.models import MLP, LeNet5
from plasticnet.apps.scores import evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from cost_models import ResNet20

SETTINGS = {"lr": 2e-3, "batch": 32, "first": 3, "plastic": 18, "last": 7, "k": 7.0, "seed": 0}
SHARES = (0.5, 0.3, 0.1, 0.05)
LOSSES = (0.02, 0.1)
COSTS = {"params": "parameters", "macs": "macs", "units": "units"}


def enlarged(data: Data, size: int, channels: int) -> Data:
    """The digits as larger images, with equal channels."""

    def split(s: Split) -> Split:
        return Split(F.interpolate(s.x, size=(size, size), mode="bilinear").expand(-1, channels, -1, -1), s.y)

    return Data(split(data.train), split(data.val), split(data.test))


def networks() -> dict[str, tuple[Callable[[], nn.Module], Data]]:
    """What is trained, and on what."""
    digits = load_data("digits", seed=SETTINGS["seed"])
    return {
        "MLP 256-128": (lambda: MLP([64, 256, 128, 10]), digits),
        "LeNet-5": (LeNet5, enlarged(digits, 28, 1)),
        "ResNet-20": (lambda: ResNet20(16, 32, 64), enlarged(digits, 16, 3)),
    }


def train(make: Callable[[], nn.Module], data: Data, budget: Budget | None) -> tuple[PlasticNet, Schedule, float]:
    """The usual loop; returns the hardened network, its schedule and the CPU seconds."""
    s, started = SETTINGS, time.process_time()
    torch.manual_seed(s["seed"])
    net = PlasticNet(make(), (data.train.x[:2],))
    optimizer = torch.optim.Adam(net.param_groups(s["lr"]))
    epochs = [(s["first"], math.inf), (s["plastic"], s["k"] if budget else math.inf), (s["last"], math.inf)]
    schedule = Schedule(net, optimizer, [Stage(*e) for e in epochs], budget=budget)
    for _ in range(schedule.epochs):
        net.train()
        for index in torch.randperm(len(data.train)).split(s["batch"]):
            x, y = data.train.x[index], data.train.y[index]

            def losses(x: Tensor = x, y: Tensor = y) -> Tensor:
                return F.cross_entropy(net(x), y, reduction="none")

            loss = net.expected_loss(losses) + schedule.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step(evaluate(net, data.val)[0])
    return net, schedule, time.process_time() - started


def costs(net: PlasticNet) -> dict[str, float]:
    """What the open units cost."""
    summary = net.summary()
    return {
        "parameters": summary.open_parameters,
        "macs": summary.open_macs,
        "units": sum(site.open for site in summary.sites),
    }


def cheapest(make: Callable[[], nn.Module], data: Data, net: PlasticNet, cost: str) -> float:
    """What one more unit would cost at least: the original architecture in the sizes of ``net``, and one unit more
    at the site where it is cheapest."""
    before = costs(net)[cost]
    found = []
    for name, units in {n: len(s) for n, s in net.sites.items()}.items():
        full = PlasticNet(make(), (data.train.x[:2],))
        if units < len(full.sites[name]):
            full.resize({n: range(len(s) + (n == name)) for n, s in net.sites.items()})
            found.append(costs(full)[cost] - before)
    return min(found, default=0.0)


def result(net: PlasticNet, data: Data, seconds: float) -> dict[str, Any]:
    """What is recorded of every run."""
    loss, accuracy = evaluate(net.compact(), data.test)
    val_loss, _ = evaluate(net, data.val)
    units = {n: len(s) for n, s in net.sites.items()}
    return {
        **costs(net), "test_accuracy": accuracy, "test_loss": loss, "val_loss": val_loss, "sites": units,
        "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def budgets_of(name: str) -> list[dict[str, float] | None]:
    """None for the dense network, then all costs and shares, and two losses on the first network."""
    shares: list[dict[str, float] | None] = [{kind: share} for kind in COSTS for share in SHARES]
    return [None, *shares, *({"loss": loss} for loss in LOSSES if name == "MLP 256-128")]


def row_of(make: Callable[[], nn.Module], data: Data, budget: dict[str, float] | None) -> dict[str, Any]:
    """One training, and how near it has come to its budget."""
    net, schedule, seconds = train(make, data, Budget(**budget) if budget else None)
    row: dict[str, Any] = {"budget": budget}
    if budget and "loss" in budget:
        row |= {"limit": schedule.force.reference + budget["loss"]}
    elif budget:
        cost = COSTS[next(iter(budget))]
        target, reached = schedule.force.targets[cost], costs(net)[cost]
        whole = costs(PlasticNet(make(), (data.train.x[:2],)))[cost]
        row |= {"target": target, "reached": reached, "below_percent": 100 * (1 - reached / target)}
        row |= {"share": reached / whole, "one_more": cheapest(make, data, net, cost)}
    return row | result(net, data, seconds)


def main() -> None:
    """What is not there yet, for all networks, or for those that are named."""
    torch.set_num_threads(1)
    every = networks()
    for name in sys.argv[1:] or list(every):
        for budget in budgets_of(name):
            if known("budgets", network=name, budget=budget):
                continue
            row = {"network": name, "commit": environment()["commit"], **row_of(*every[name], budget)}
            print({k: v for k, v in row.items() if k != "sites"}, flush=True)
            rows = sorted([*written("budgets"), row], key=lambda r: list(every).index(r["network"]))
            write("budgets", {**SETTINGS, "shares": SHARES, "default": asdict(Budget(macs=0.5))}, rows)


if __name__ == "__main__":
    main()
