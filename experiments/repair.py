"""Trained networks cut at once by several scores, and repaired: test accuracy, and the error to their own outputs.

LeNet-5 is trained on 20,000 images of Fashion-MNIST. ResNet-20 has the weights of
https://github.com/akamaster/pytorch_resnet_cifar10 as safetensors, and reads CIFAR-10 as Parquet files of images, for
which ``pyarrow``, ``pillow`` and ``safetensors`` are needed. Nothing is trained after the cut. Scores and repair read
the same 2,048 training images. Test data are read at the end of each row and decide nothing.

About three minutes a share on one core: python experiments/repair.py --data-dir DIR --network lenet --share 0.5. Adds
rows to results/repair.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import BATCH, accuracy, images, published
from common import write, written
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.models import LeNet5

KINDS = ("magnitude", "gate", "fisher", "repair")
CALIBRATE = 2048


def fashion(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of Fashion-MNIST."""
    from torchvision.datasets import FashionMNIST

    data = FashionMNIST(str(folder), train=train, download=False)
    return ((data.data.float() / 255 - 0.2860) / 0.3530)[:, None], data.targets


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """A LeNet-5 in evaluation mode, after some epochs of Adam on images and labels."""
    model = LeNet5()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    return model.eval()


def prepared(network: str, folder: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A trained network, images to calibrate with and their labels, and test images and labels."""
    torch.manual_seed(0)
    if network == "resnet20":
        return published(20, folder), *images(folder, "train", CALIBRATE), *images(folder, "test", 10_000)
    x, y = (t[:20_000] for t in fashion(folder, train=True))
    return trained(x, y, 3), x[:CALIBRATE], y[:CALIBRATE], *fashion(folder, train=False)


def row(model: nn.Module, kind: str, share: float, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Cut a copy by one kind of score, repair it, and measure it after each step."""
    net, batches = pn.PlasticNet(copy.deepcopy(model), (x[:2],)), x.split(BATCH)
    labels = zip(batches, y.split(BATCH), strict=True)
    begun = time.process_time()

    def loss() -> Tensor:
        inputs, wanted = next(labels)
        return F.cross_entropy(net(inputs), wanted, reduction="none")

    if kind == "gate":
        found = pn.scores(net, kind, loss, batches=len(batches))
    else:
        found = pn.scores(net, kind, batches=batches if kind in ("fisher", "repair") else 1)
    pn.prune_once(net, pn.Budget(macs=share), scores=found, per_cost=kind in ("fisher", "repair"), cut=False)
    scored = time.process_time()
    at_once = accuracy(net.compact(), *test)
    again = time.process_time()
    repaired = pn.repair(net, batches)
    done = time.process_time()
    return {
        "scores": kind,
        "share": share,
        "units": {n: int(s.open.sum()) for n, s in net.sites.items()},
        "accuracy": {"at once": at_once, "repaired": accuracy(net.compact(), *test)},
        "error": {"at once": repaired.before, "repaired": repaired.after},
        "seconds": {"scores": scored - begun, "repair": done - again},
    }


def main() -> None:
    """Measure one network at one share, by all kinds of scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--network", choices=("lenet", "resnet20"), required=True)
    parser.add_argument("--share", type=float, required=True)
    parser.add_argument("--scores", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    model, x, y, *test = prepared(options.network, options.data_dir)
    dense = accuracy(model, test[0], test[1])
    for kind in options.scores:
        found = {
            "network": options.network,
            "dense": dense,
            **row(model, kind, options.share, x, y, (test[0], test[1])),
        }
        print({k: v for k, v in found.items() if k != "units"}, flush=True)
        mine = (options.network, options.share, kind)
        others = [r for r in written("repair") if (r["network"], r["share"], r["scores"]) != mine]
        write("repair", {"calibrate": CALIBRATE, "batch": BATCH, "seed": 0}, [*others, found])


if __name__ == "__main__":
    main()
