"""A ResNet-20 from random weights on 20,000 images of CIFAR-10, pruned in the only training that it gets.

"gates" learns which channels stay in the first half of the epochs, under a budget of the multiply-adds. Beside it are
"dense", the whole network, and "same widths", a network that has the widths of "gates" from the start. All have as many
epochs with augmentation, SGD, and one cycle of the learning rate. Test images are read once, at the end of a training.

Twenty epochs of each take an hour on one core: python experiments/cifar_scratch.py --data-dir DIR --cache DIR. A
training that was cut off goes on after its last epoch. Adds rows to results/cifar_scratch.json.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import ResNet, accuracy
from cifar_cut import decoded
from cifar_gates import DECAY, GATE_RATE, PERIODS, Training, plainly, with_gates
from common import known, write, written
from pruning import cycle, operations, renewed
from torch import Tensor, nn

import plasticnet as pn

NAME, IMAGES, RATE = "cifar_scratch", 20_000, 0.1
WAYS = ("dense", "gates", "same widths")  # the last one needs the row of the one before it


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The losses of images, from their labels."""
    return F.cross_entropy(model(x), y, reduction="none")


def widths(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How many channels there are in each place."""
    return {name: len(site) for name, site in pn.PlasticNet(copy.deepcopy(model), (x[:2],)).sites.items()}


def anew(depth: int, x: Tensor, seed: int, channels: Mapping[str, int] | None = None) -> nn.Module:
    """A ResNet with random weights, of the usual widths or of others."""
    torch.manual_seed(seed)
    model: nn.Module = ResNet(depth)
    if channels is not None:
        model = renewed(pn.PlasticNet(model, (x[:2],)), channels)
    return model


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="where decoded images and trainings are kept")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, held_out, test = decoded(options.data_dir, options.cache)
    train = train[0][: options.images], train[1][: options.images]
    base = {"depth": options.depth, "epochs": options.epochs, "images": options.images}
    for seed in options.seeds:
        for way in WAYS:
            key = {**base, "share": 1.0 if way == "dense" else options.share, "way": way, "seed": seed}
            if known(NAME, **key):
                continue
            channels = None
            if way == "same widths":
                like = {**key, "way": "gates"}
                channels = next(r["widths"] for r in written(NAME) if like.items() <= r.items())
            model = anew(options.depth, train[0], seed, channels)
            kept = options.cache / f"scratch-{'-'.join(map(str, key.values()))}.safetensors"
            training = Training(losses, train, options.epochs, seed, kept)
            if way == "gates":
                small = with_gates(
                    training, model, options.share, lambda place: cycle(place, RATE), options.epochs // 2
                )
            else:
                small = plainly(training, model, RATE)
            row = {**key, "held out": accuracy(small, *held_out), "test": accuracy(small, *test)}
            row |= {"macs": operations(small, train[0]) / operations(ResNet(options.depth), train[0])}
            row |= {"widths": widths(small, train[0]), "parameters": sum(p.numel() for p in small.parameters())}
            row |= {"seconds": training.seconds}
            print(row, flush=True)
            settings = {"rate": RATE, "gate rate": GATE_RATE, "decay": DECAY, "periods": PERIODS}
            write(NAME, settings, [*written(NAME), row])
            kept.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
