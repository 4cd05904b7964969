"""Growth beside other ways to grow that know the final widths beforehand, with the same training.

"ours" grows from 3 units a site under a price, as in growth_price.py. Its peers begin with 3 units, too, and grow on a
fixed schedule to the widths with which ours ended: by the same number of units after each of the first epochs, as many
as growth may last at most. They have the same epochs, batches, optimizer and learning rates, and no pressure. "gradmax"
gives new units the incoming weights that make the gradient of their outgoing ones large, on 512 samples (`net.grow`).
"split" copies random units and shares out their outgoing weights (Net2WiderNet, arXiv 1511.05641), with noise so that
copies part. "random" gives new units random weights, and "known" has all of them from the beginning.

It takes five minutes on one core: python experiments/growth_peers.py --data-dir DIR. Writes results/growth_peers.json;
what is there is not run again, unless it was grown by another rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import growth_price
import torch
from growth_price import network, trained
from growth_rows import path, row
from growth_tasks import Task, task
from torch import nn

import plasticnet as pn

NAME, START = "growth_peers", 3
PEERS = ("gradmax", "split", "random", "known")
SAMPLES, NOISE = 512, 0.1  # for GradMax; and of the deviation of the weights that are copied


@torch.no_grad()
def split(
    net: pn.PlasticNet, counts: Mapping[str, int], optimizer: torch.optim.Optimizer | None, noise: float = NOISE
) -> None:
    """Add copies of random units to the sites of an MLP; without noise the network computes what it did before."""
    for i, (name, n) in enumerate(counts.items()):
        had = len(net.sites[name])
        net.grow({name: n}, optimizer)
        own, reader = [m for m in net.model.modules() if isinstance(m, nn.Linear)][i : i + 2]
        chosen = torch.randint(had, (n,))
        rows = own.weight[chosen]
        own.weight[had:] = rows + noise * own.weight[:had].std() * torch.randn_like(rows)
        own.bias[had:] = own.bias[chosen]
        reader.weight[:, :had] /= 1 + torch.bincount(chosen, minlength=had)
        reader.weight[:, had:] = reader.weight[:, chosen]


def peer(task: Task, way: str, found: Sequence[int], seed: int) -> dict[str, Any]:
    """One run of a peer to the widths that were found."""
    if way == "known":
        return trained(task, network(task, seed, widths=list(found)), [pn.Stage(task.epochs)], None, 0.0)
    net = network(task, seed, widths=[min(START, n) for n in found])
    first, growing = {name: len(s) for name, s in net.sites.items()}, (task.epochs - task.epochs // 5) // 2
    last = dict(zip(first, found, strict=True))
    x, y = task.parts[0]

    def grow(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        if epoch > growing:
            return
        wanted = {name: n + round((last[name] - n) * epoch / growing) for name, n in first.items()}
        counts = {name: n - len(net.sites[name]) for name, n in wanted.items()}
        if way == "gradmax":
            i = torch.randperm(len(x))[:SAMPLES]
            net.grow(counts, optimizer, init="gradmax", loss=lambda: task.losses(net(x[i]), y[i]))
        elif way == "split":
            split(net, counts, optimizer)
        else:
            net.grow(counts, optimizer, init="random")

    return trained(task, net, [pn.Stage(task.epochs)], None, 0.0, grow)


def run(task: Task, way: str, seed: int, found: Sequence[int]) -> dict[str, Any]:
    """One run of any way."""
    ours = way == "ours"
    end = growth_price.run(task, "grown", START, task.price, seed) if ours else peer(task, way, found, seed)
    return {**end, "widths": path(end["widths"].split())}


def main() -> None:
    """All ways on both tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "adult"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "start": START, "samples for gradmax": SAMPLES, "noise of split": NOISE, "gate rate": growth_price.GATE_RATE,
        "k": growth_price.K,
    }  # fmt: skip
    for name in options.tasks:
        chosen = task(name, options.data_dir)
        for seed in range(options.seeds):
            found: list[int] = []
            for way in ("ours", *PEERS):
                measure = partial(run, chosen, way, seed, found)
                made = row(NAME, settings, {"task": name, "seed": seed, "way": way}, measure, grows=True)
                found = list(made["units"].values()) if way == "ours" else found


if __name__ == "__main__":
    main()
