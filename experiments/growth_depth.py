"""Depth and widths of a small ResNet together: grown from one block a stage, and pruned from three, at the same price.

The network has three stages on the 8x8 images of the digits. "grown" begins with one block a stage and three units a
site, "grown at full depth" with three blocks, whose number only the pressure changes, and "pruned" with three blocks of
16 channels. All of them get the same epochs, batches, learning rates and price of a parameter. Test data are read once,
at the end of a run.

All runs of three seeds take four minutes on one core: python experiments/growth_depth.py. Writes
results/growth_depth.json; what is there is not run again, unless it was grown by another rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import growth_price
import torch
from growth_rows import path, row
from growth_tasks import Task, task
from torch import Tensor, nn

import plasticnet as pn

NAME = "growth_depth"
PRICE, EPOCHS, START, WIDTH, DEPTH, STAGES = 1e-5, 30, 3, 16, 3, 3
WAYS = {"grown": 1, "grown at full depth": None, "pruned": None}  # how many blocks of a stage are open at first


class Block(nn.Module):
    """A residual block with the activation after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class ResNet(nn.Module):
    """Stages of blocks; each but the first begins with a convolution that halves the image."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH, stages: int = STAGES) -> None:
        super().__init__()
        self.begins = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width if i else 1, width, 3, stride=2 if i else 1, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for i in range(stages)
        )
        self.stages = nn.ModuleList(nn.Sequential(*[Block(width) for _ in range(depth)]) for _ in range(stages))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 1, 8, 8)
        for begin, stage in zip(self.begins, self.stages, strict=True):
            x = stage(begin(x))
        return self.head(x.mean((2, 3)))


def run(task: Task, way: str, seed: int, price: float) -> dict[str, Any]:
    """One run, with the number of open blocks of each stage, and what was counted and measured at the end."""
    torch.manual_seed(seed)
    net = pn.PlasticNet(task.model(), (task.parts[0][0][:8],), blocks=["stages.*.?"])
    if way != "pruned":
        pn.narrow(net, START, blocks=WAYS[way])
    hardened = task.epochs // 5
    before = growth_price.BEFORE if way == "pruned" else 0
    stages = [pn.Stage(before), pn.Stage(task.epochs - hardened - before, k=growth_price.K), pn.Stage(hardened)]
    opened: list[str] = []
    depths = [site for name, site in net.sites.items() if name.endswith("depth")]

    def count(*_: object) -> None:
        opened.append("-".join(str(int((site.open | (site.grace > 0)).sum())) for site in depths))

    end = growth_price.trained(task, net, stages, None if way == "pruned" else pn.Growth(), price, count)
    return {**end, "widths": path(end["widths"].split()), "blocks": path(opened)}


def main(arguments: Sequence[str] | None = None) -> None:
    """All ways for all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--price", type=float, default=PRICE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = replace(task("digits", None), model=ResNet, epochs=EPOCHS)
    settings = {
        "start": START, "epochs": EPOCHS, "width": WIDTH, "depth": DEPTH, "gate rate": growth_price.GATE_RATE,
        "k": growth_price.K, "epochs before the pressure": growth_price.BEFORE,
    }  # fmt: skip
    for seed in range(options.seeds):
        for way in WAYS:
            key = {"way": way, "seed": seed, "price": options.price}
            row(NAME, settings, key, partial(run, chosen, way, seed, options.price), grows=way != "pruned")


if __name__ == "__main__":
    main()
