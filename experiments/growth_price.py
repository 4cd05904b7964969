"""Growing under the price that prunes, from several starts, beside pruning at the same price and dense training.

A grown network starts with a few units a site, and `pn.Growth` decides the rest; a pruned one starts wide, and is
trained for three epochs before the pressure begins. "known" is a network of the widths that growth from 3 units has
found, from random weights. All of them get the same epochs, batches, learning rates and price. Test data are read
once, at the end of a run.

A run on the digits takes ten seconds: python experiments/growth_price.py. Other tasks need --data-dir. Adds rows to
results/growth_price.json; what is there is not run again, unless it was grown by another rule.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import written
from growth_rows import row
from growth_tasks import Part, Task, task
from torch import nn

import plasticnet as pn

NAME = "growth_price"
GATE_RATE, K, BEFORE = 0.1, 7.0, 3
Run = dict[str, Any]
After = Callable[[pn.PlasticNet, torch.optim.Optimizer, int], object]


@torch.no_grad()
def judged(task: Task, net: nn.Module, part: Part) -> float:
    """What the task reports of a network on some data."""
    net.eval()
    return float(task.error(torch.cat([net(x) for x in part[0].split(1000)]), part[1]))


@torch.no_grad()
def paid(task: Task, net: nn.Module, parameters: int, price: float) -> float:
    """The objective at the end: the mean loss on the data to train on, and what the parameters cost."""
    net.eval()
    x, y = task.parts[0]
    losses = torch.cat([task.losses(net(a), b) for a, b in zip(x.split(1000), y.split(1000), strict=True)])
    return float(losses.mean()) + price * parameters


def trained(
    task: Task,
    net: pn.PlasticNet,
    stages: list[pn.Stage],
    growth: pn.Growth | None,
    price: float | pn.Budget,
    after: After | None = None,
) -> Run:
    """Train a network to the end of its stages, and say what came of it.

    ``after`` is called with the network, the optimizer and the number of epochs that are over, after each epoch.
    """
    optimizer = torch.optim.Adam(net.param_groups(task.rate, GATE_RATE))
    force: Run = {"budget": price} if isinstance(price, pn.Budget) else {"pressure": pn.Pressure(price, "parameters")}
    schedule = pn.Schedule(net, optimizer, stages, growth=growth, **force)
    x, y = task.parts[0]
    begun, peak, widths = time.process_time(), {"parameters": 0, "macs": 0}, []
    while schedule.epoch < schedule.epochs:
        net.train()
        for i in torch.randperm(len(x)).split(task.batch):
            loss = net.expected_loss(lambda i=i: task.losses(net(x[i]), y[i]))
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()
        if after is not None:
            after(net, optimizer, schedule.epoch)
        size = net.summary()
        peak = {"parameters": max(peak["parameters"], size.parameters), "macs": max(peak["macs"], size.macs)}
        widths.append("-".join(str(len(s)) for s in net.sites.values()))
    seconds, size = time.process_time() - begun, net.summary()
    objective = None if isinstance(price, pn.Budget) else paid(task, net, size.open_parameters, price)
    return {
        "units": {s.name: s.open for s in size.sites}, "parameters": size.open_parameters, "macs": size.open_macs,
        "peak": peak, "validation": judged(task, net, task.parts[1]), "test": judged(task, net, task.parts[2]),
        "objective": objective, "seconds": seconds, "widths": " ".join(widths),
    }  # fmt: skip


def plain(task: Task, net: pn.PlasticNet) -> Run:
    """Train a network of fixed widths in the ordinary way."""
    return trained(task, net, [pn.Stage(task.epochs)], None, 0.0)


def network(task: Task, seed: int, widths: list[int] | None = None, start: int | None = None) -> pn.PlasticNet:
    """The wide network, or one that was made narrow and begins anew."""
    torch.manual_seed(seed)
    net = pn.PlasticNet(task.model(), (task.parts[0][0][:2],))
    if start is not None:
        pn.narrow(net, start)
    if widths is not None:
        # A site may have grown beyond the width that the model has at first.
        sources = {
            n: [*range(min(w, len(s))), *[-1] * (w - len(s))]
            for (n, s), w in zip(net.sites.items(), widths, strict=True)
        }
        net.resize(sources)
        for module in net.model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return net


def run(
    task: Task, way: str, start: int | None, price: float | pn.Budget, seed: int, found: list[int] | None = None
) -> Run:
    """One run."""
    hardened = task.epochs // 5
    if way == "grown":
        stages = [pn.Stage(task.epochs - hardened, k=K), pn.Stage(hardened)]
        return trained(task, network(task, seed, start=start), stages, pn.Growth(), price)
    if way == "pruned":
        stages = [pn.Stage(BEFORE), pn.Stage(task.epochs - hardened - BEFORE, k=K), pn.Stage(hardened)]
        return trained(task, network(task, seed), stages, None, price)
    return plain(task, network(task, seed, widths=found if way == "known" else None))


def main() -> None:
    """Measure one task at some prices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0], help="of the price of the task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", type=int, nargs="+", default=[3, 1, 10])
    parser.add_argument("--ways", nargs="+", default=["dense", "pruned", "grown", "known"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = task(options.task, options.data_dir)
    for factor in options.factors:
        price = float(f"{chosen.price * factor:.4g}")  # without the last digits of a product
        for seed in options.seeds:
            found: list[int] | None = None
            for way in options.ways:
                for start in options.starts if way == "grown" else [None]:
                    key = {"task": options.task, "way": way, "start": start, "seed": seed}
                    key["price"] = None if way == "dense" else price
                    if way == "known":
                        rows = [
                            r for r in written(NAME) if (r["task"], r["way"], r["start"]) == (options.task, "grown", 3)
                        ]
                        found = next(
                            list(r["units"].values()) for r in rows if (r["seed"], r["price"]) == (seed, price)
                        )
                    measured = partial(run, chosen, way, start, price, seed, found)
                    settings = {"gate rate": GATE_RATE, "k": K, "epochs before the pressure": BEFORE}
                    row(NAME, settings, key, measured, grows=way in ("grown", "known"))


if __name__ == "__main__":
    main()
