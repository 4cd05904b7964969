"""MNIST with 6,200 parameters at most: a convolutional network that grows from three channels a layer to that budget.

It grows, moves units between its layers and is pruned while it sees all training images eight times, in 32 periods of
a quarter of them. The network of the size that was found is then trained on, with a learning rate that falls to zero.
Images are turned, scaled, sheared and shifted at random. The architecture and all settings were chosen on 5,000
validation images, which are not trained on; test images are read once, at the end of a run. "From the beginning" trains
the widths that were found from random weights, for as many images. GNAP (arXiv 2603.19759) reports 99.44 % with 6.2
thousand parameters.

A run takes a quarter of an hour on one core: python experiments/growth_few.py --data-dir DIR. Adds rows to
results/growth_few.json; what is there is not run again, unless it was grown by another rule.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import written
from growth_rows import path, row
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.data import Data, Split, load_data

NAME = "growth_few"
MOST, START, WIDTHS = 6200, 3, (16, 20, 24, 28, 28)
BATCH, RATE, GATE_RATE, K = 128, 0.01, 0.1, 7.0
PERIODS, PLASTIC, HARDENED = 4, 8, 40  # periods of an epoch, and epochs


def layer(inputs: int, outputs: int, padding: int = 0) -> list[nn.Module]:
    """A convolution, its norm and ReLU."""
    return [nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def network(a: int, b: int, c: int, d: int, e: int) -> nn.Sequential:
    """Five convolutions of these widths, and a linear layer on the mean over what is left of the image."""
    return nn.Sequential(
        *layer(1, a), *layer(a, b), nn.MaxPool2d(2), *layer(b, c, padding=1), *layer(c, d), nn.MaxPool2d(2),
        *layer(d, e), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(e, 10),
    )  # fmt: skip


def moved(x: Tensor) -> Tensor:
    """Images turned by up to 10 degrees, scaled and sheared by up to a tenth, and shifted by up to two pixels."""

    def drawn(most: float) -> Tensor:
        return (torch.rand(len(x)) * 2 - 1) * most

    angle, scale = drawn(0.18), 1 + drawn(0.1)
    rows = [
        torch.stack([angle.cos(), -angle.sin() * scale + drawn(0.1), drawn(0.14)], 1),
        torch.stack([angle.sin() * scale, angle.cos() * (1 + drawn(0.1)), drawn(0.14)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(net: nn.Module, part: Split) -> float:
    """In percent."""
    net.eval()
    return 100 * float(torch.cat([net(x).argmax(1) for x in part.x.split(1000)]).eq(part.y).float().mean())


def trained(net: pn.PlasticNet, data: Data, stages: list[pn.Stage], settings: dict[str, Any]) -> dict[str, Any]:
    """Train to the end of the stages, of which the last one ends with a rate of zero."""
    optimizer = torch.optim.Adam(net.param_groups(RATE, GATE_RATE))
    schedule = pn.Schedule(net, optimizer, stages, **settings)
    begun, peak, widths = time.process_time(), 0, []
    last = stages[-1].epochs * (len(data.train) // PERIODS // BATCH)
    left, order = last, torch.zeros(0, dtype=torch.long)
    while schedule.epoch < schedule.epochs:
        net.train()
        if len(order) < BATCH * (len(data.train) // PERIODS // BATCH):
            order = torch.randperm(len(data.train))
        for _ in range(len(data.train) // PERIODS // BATCH):
            i, order = order[:BATCH], order[BATCH:]
            x, y = moved(data.train.x[i]), data.train.y[i]
            if schedule.epochs - schedule.epoch <= stages[-1].epochs:
                optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * (1 - left / last))) / 2
                left -= 1
            loss = net.expected_loss(lambda x=x, y=y: F.cross_entropy(net(x), y, reduction="none"))
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()
        size = net.summary()
        peak = max(peak, size.parameters)
        widths.append("-".join(str(len(s)) for s in net.sites.values()))
    small = net.compact()
    return {
        "units": [len(s) for s in net.sites.values()], "parameters": sum(p.numel() for p in small.parameters()),
        "macs": net.summary().macs, "peak": peak, "validation": accuracy(small, data.val),
        "test": accuracy(small, data.test), "seconds": round(time.process_time() - begun), "widths": path(widths),
    }  # fmt: skip


def run(data: Data, way: str, seed: int, found: list[int] | None) -> dict[str, Any]:
    """One run."""
    torch.manual_seed(seed)
    example = (data.train.x[:2],)
    if way == "grown":
        net = pn.PlasticNet(network(*WIDTHS), example)
        pn.narrow(net, START)
        stages = [pn.Stage(PERIODS * PLASTIC, k=K), pn.Stage(PERIODS * HARDENED)]
        return trained(net, data, stages, {"growth": pn.Growth(), "budget": pn.Budget(params=MOST)})
    assert found is not None
    return trained(pn.PlasticNet(network(*found), example), data, [pn.Stage(PERIODS * (PLASTIC + HARDENED))], {})


def main() -> None:
    """Both ways with some seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=["grown", "from the beginning"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("mnist", options.data_dir)
    settings = {
        "parameters, at most": MOST, "start": START, "batch": BATCH, "rate": RATE, "gate rate": GATE_RATE, "k": K,
        "plastic epochs": PLASTIC, "hardened epochs": HARDENED, "periods of an epoch": PERIODS,
    }  # fmt: skip
    for seed in options.seeds:
        for way in options.ways:
            found = [r["units"] for r in written(NAME) if (r["way"], r["seed"]) == ("grown", seed)]
            measured = partial(run, data, way, seed, found[0] if found else None)
            row(NAME, settings, {"way": way, "seed": seed}, measured, grows=True)


if __name__ == "__main__":
    main()
