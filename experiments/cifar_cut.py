"""CIFAR-10 ResNets cut at once, repaired, and trained further, against the network as it was with as much training.

The images are JPEG files, on which the published weights are some ten points worse than on the original ones. So the
network is first trained on them, epoch by epoch, until an epoch brings less than 0.1 points on 5,000 training images
that are held out; this network is "dense". A cut network is what `pn.shrink` makes of it without labels. The dense one
and the cut ones then get the same further epochs with labels, once from where the cut left them with BatchNorm
statistics estimated anew, and once from the repaired network. All 10,000 test images are read at the end of each row,
and decide nothing. A seed draws the 2,048 images of scores and repair, and the order of training.

    python experiments/cifar_cut.py --data-dir DIR --cache DIR

takes an hour and a half on one core for ResNet-20 and one further epoch. It adds rows to results/cifar_cut.json; what
is there is not run again, and a training that was cut off goes on after its last epoch (its time is then not known).
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from cifar import BATCH, accuracy, epochs, images, published
from common import known, write, written
from norms import reestimated
from torch import Tensor, nn

import plasticnet as pn

CALIBRATE, HELD_OUT = 2048, 5000
RATE, FURTHER = 0.01, 0.01  # the learning rates of the first training and of what follows a cut
NAME = "cifar_cut"
Data = tuple[Tensor, Tensor]


def cached(path: Path, make: Any) -> Any:
    """What is in a file, or what a function makes, which is then kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    return torch.load(path, weights_only=True)


def tuned(depth: int, folder: Path, cache: Path, train: Data, held_out: Data) -> dict[str, Any]:
    """The state of a network that was trained on these files until it gets no better, and how that went."""
    model = published(depth, folder)
    found = [accuracy(model, *held_out)]
    best = copy.deepcopy(model.state_dict())
    while len(found) < 2 or found[-1] - max(found[:-1]) >= 0.1:
        best = copy.deepcopy(model.state_dict())
        state = cached(cache / f"epoch{len(found)}-{depth}.pt", lambda: epoch(model, train, held_out, len(found)))
        model.load_state_dict(state["state"])
        found.append(state["held out"])
        print(f"trained for epoch {len(found) - 1}: {found[-1]:.2f} % of the images held out", flush=True)
    if found[-1] > max(found[:-1]):
        best = model.state_dict()
    return {"state": best, "held out": found}


def decoded(folder: Path, cache: Path) -> tuple[Data, Data, Data]:
    """Images to train on, those held out, and those to test on."""
    x, y = cached(cache / "train.pt", lambda: images(folder, "train", 50_000))
    test = cached(cache / "test.pt", lambda: images(folder, "test", 10_000))
    return (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT]), test


def prepared(depth: int, folder: Path, cache: Path) -> tuple[nn.Module, Data, Data, Data, dict[str, Any]]:
    """The network that is "dense", images to train on, those held out, and those to test on, and how it was trained.

    Args:
        depth: The depth of the network.
        folder: Where images and published weights are.
        cache: Where decoded images and the network are kept.
    """
    train, held_out, test = decoded(folder, cache)
    first = cached(cache / f"dense{depth}.pt", lambda: tuned(depth, folder, cache, train, held_out))
    dense = published(depth, folder)
    dense.load_state_dict(first["state"])
    return dense, train, held_out, test, first


def epoch(model: nn.Module, train: Data, held_out: Data, number: int) -> dict[str, Any]:
    """The state of a network after one more epoch, and its accuracy on the images held out."""
    for _ in epochs(model, *train, 1, RATE, number):
        pass
    return {"state": model.state_dict(), "held out": accuracy(model, *held_out)}


def cut(model: nn.Module, share: float, x: Tensor) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The network cut and not repaired, the same repaired, and what came out: the steps of `pn.shrink` one by one."""
    net, begun = pn.PlasticNet(copy.deepcopy(model), (x[:2],)), time.process_time()
    found = pn.scores(net, "repair", batches=x.split(BATCH))
    pn.prune_once(net, pn.Budget(macs=share), scores=found, per_cost=True, cut=False)
    at_once, scored = net.compact(), time.process_time()
    pn.repair(net, x.split(BATCH))
    seconds = {"scores and cut": scored - begun, "repair": time.process_time() - scored}
    units = {name: int(site.open.sum()) for name, site in net.sites.items()}
    return at_once, net.compact(), {"seconds": seconds, "units": units, "macs": net.summary().open_macs}


def main() -> None:
    """Measure one depth at all shares and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="where decoded images and the dense network are kept")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.73, 0.5, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs="*", default=[1], help="further epochs, each number in its own row")
    parser.add_argument(
        "--networks", nargs="+", default=["dense", "re-estimated", "repaired"], help="those trained further"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense, train, _, test, first = prepared(options.depth, options.data_dir, options.cache)

    def add(row: dict[str, Any]) -> None:
        print({k: v for k, v in row.items() if k != "units"}, flush=True)
        settings = {"calibrate": CALIBRATE, "batch": BATCH, "held out": HELD_OUT, "rate": RATE, "further rate": FURTHER}
        write(NAME, settings, [*written(NAME), row])

    def further(model: nn.Module, count: int, key: dict[str, Any]) -> None:
        if known(NAME, **key, epochs=count):
            return
        begun, twin = time.process_time(), copy.deepcopy(model)
        kept = options.cache / "-".join(str(part) for part in ("further", *key.values(), f"{count}.pt"))
        resumed = kept.exists()
        for _ in epochs(twin, *train, count, FURTHER, key["seed"], kept):
            pass
        seconds = {} if resumed else {"training": time.process_time() - begun}
        row = {"accuracy": accuracy(twin, *test), "seconds": seconds, "held out": first["held out"]}
        add({**key, "epochs": count, **row})

    base = {"depth": options.depth}
    if not known(NAME, **base, network="dense", epochs=0):
        row = {"accuracy": accuracy(dense, *test), "held out": first["held out"]}
        add({**base, "network": "dense", "share": 1.0, "seed": 0, "epochs": 0, **row})
    for seed in options.seeds:
        chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:CALIBRATE]
        networks: dict[tuple[str, float], nn.Module] = {("dense", 1.0): dense}
        for share in options.shares:
            at_once, repaired, how = cut(dense, share, train[0][chosen])
            batches = train[0][chosen].split(BATCH)
            networks["re-estimated", share] = reestimated(at_once, batches, nn.Module.__call__) or at_once
            networks["repaired", share] = repaired
            for name, network in (("cut", at_once), *((n, m) for (n, s), m in networks.items() if s == share)):
                key = {**base, "network": name, "share": share, "seed": seed, "epochs": 0}
                if not known(NAME, **key):
                    add({**key, "accuracy": accuracy(network, *test), **how})
        for count in options.epochs:
            for (name, share), network in networks.items():
                if name in options.networks:
                    further(network, count, {**base, "network": name, "share": share, "seed": seed})


if __name__ == "__main__":
    main()
