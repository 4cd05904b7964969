"""Does time follow multiply-adds? Networks that `pn.shrink` cut to half of their multiply-adds, timed beside the whole.

LeNet-5 on Fashion-MNIST and ResNet-20 on CIFAR-10, as in repair.py, and the ViT of transformers_cut.py. The whole
network and the compact one take turns within one run, forward pass by forward pass, on one thread; the CPU time of the
process counts, so that other work on the machine matters little. A run's times are medians over its passes.

Three minutes on one core: python experiments/shrink_latency.py --data-dir DIR. Writes results/shrink_latency.json.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cifar import images, published
from common import write, written
from repair import prepared
from torch import Tensor, nn
from transformers_cut import TASKS, chosen, trained

import plasticnet as pn

NAME, SHARE, CALIBRATE = "shrink_latency", 0.5, 2048
PASSES = {1: 200, 64: 40}  # for each size of a batch


def lenet(folder: Path, _: Path) -> tuple[nn.Module, Tensor]:
    """A trained LeNet-5 and images."""
    model, x, *_ = prepared("lenet", folder)
    return model, x


def resnet20(folder: Path, _: Path) -> tuple[nn.Module, Tensor]:
    """ResNet-20 and images."""
    return published(20, folder), images(folder, "train", CALIBRATE)[0]


def vit(folder: Path, cache: Path) -> tuple[nn.Module, Tensor]:
    """The trained ViT and images."""
    data = TASKS["vit"].data(folder)
    return trained("vit", 0, data, cache)[0], data.x[chosen(data, CALIBRATE)]


NETWORKS: dict[str, Callable[[Path, Path], tuple[nn.Module, Tensor]]] = {
    "lenet": lenet, "resnet20": resnet20, "vit": vit,
}  # fmt: skip


@torch.no_grad()
def milliseconds(networks: tuple[nn.Module, nn.Module], x: Tensor, passes: int) -> list[float]:
    """The CPU time of a forward pass of each network, which take turns: medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(passes + 5):  # of which the first five do not count
        for network, found in zip(networks, times, strict=True):
            begun = time.process_time()
            network(x)
            if i >= 5:
                found.append(1000 * (time.process_time() - begun))
    return [median(found) for found in times]


def main() -> None:
    """Shrink each network once, and time it some runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/transformers_cut"))
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--multiple-of", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.network:
        model, x = NETWORKS[name](options.data_dir, options.cache)
        for multiple in options.multiple_of:
            small, report = pn.shrink(model, x.split(128), pn.Budget(macs=SHARE), multiple_of=multiple)
            for batch, passes in PASSES.items():
                for run in range(options.runs):
                    whole, cut = milliseconds((model, small), x[:batch], passes)
                    new: dict[str, Any] = {
                        "network": name, "seed": 0, "multiple_of": multiple, "batch": batch, "run": run,
                        "macs": [report.steps[0].macs, report.steps[-1].macs], "milliseconds": [whole, cut],
                        "units": {s.name: [s.after, s.before] for s in report.sites}, "load": os.getloadavg()[0],
                    }  # fmt: skip
                    print({k: v for k, v in new.items() if k != "units"}, flush=True)
                    keys = ("network", "multiple_of", "batch", "run")
                    others = [r for r in written(NAME) if any(r[k] != new[k] for k in keys)]
                    write(NAME, {"share": SHARE, "calibrate": CALIBRATE, "passes": PASSES}, [*others, new])


if __name__ == "__main__":
    main()
