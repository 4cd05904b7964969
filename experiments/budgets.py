"""Budgets met at the first try: MLP, LeNet-5 and ResNet-20, by parameters, MACs and units, with one setting for all.

Digits throughout: 8x8 for the MLP, enlarged to 28x28 for LeNet-5, and to 16x16 with three channels for ResNet-20.
About 20 minutes on one core. Writes results/budgets.json.
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
from common import environment, write, written
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


def main() -> None:
    """All costs and shares, and two losses on the first network: for all networks, or those that are named, whose
    results take the place of earlier ones."""
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(networks())
    commit = environment()["commit"]
    results = [r for r in written("budgets") if r["network"] not in chosen]
    for name, (make, data) in networks().items():
        if name not in chosen:
            continue
        net, _, seconds = train(make, data, None)
        full = costs(net)
        of = {"network": name, "commit": commit}
        dense = {**of, "budget": None, **result(net, data, seconds)}
        results.append(dense)
        print(dense, flush=True)
        for kind, cost in COSTS.items():
            for share in SHARES:
                net, schedule, seconds = train(make, data, Budget(**{kind: share}))
                target, reached = schedule.force.targets[cost], costs(net)[cost]
                results.append(
                    {**of, "budget": {kind: share}, "target": target, "reached": reached,
                     "below_percent": 100 * (1 - reached / target), "share": reached / full[cost],
                     "one_more": cheapest(make, data, net, cost), **result(net, data, seconds)}
                )  # fmt: skip
                print({k: v for k, v in results[-1].items() if k != "sites"}, flush=True)
        for loss in LOSSES if name == "MLP 256-128" else ():
            budget = Budget(loss=loss)
            net, schedule, seconds = train(make, data, budget)
            limit = schedule.force.reference + loss
            results.append(
                {**of, "budget": {"loss": loss}, "limit": limit, **result(net, data, seconds)}
            )  # fmt: skip
            print(results[-1], flush=True)
    results.sort(key=lambda r: list(networks()).index(r["network"]))
    write("budgets", {**SETTINGS, "shares": SHARES, "default": asdict(Budget(macs=0.5))}, results)


if __name__ == "__main__":
    main()
