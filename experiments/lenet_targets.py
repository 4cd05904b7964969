"""Operating points on MNIST beside published ones, from a large network and from three units a site.

A dense network is trained with dropout. "pruned" starts from it: its gates open, they close under a budget, the
network hardens and is trained on. "grown" starts from random weights with three units a site, grows by the gradient
until it costs twice the budget, and is then pruned to it in the same way. Both learn from the dense network's
outputs (distillation), or an MLP from those of a dense LeNet-5; the training of these counts in their time.
"known" is for comparison: a network that has the widths of the pruned one from the start, and learns for as many epochs
from the same outputs. No augmentation, but for points that move their images; the test set is read at the end.
Settings were chosen on the validation data of seeds 0 and 1; those of points k to n are those of a or d. Point m
follows Beyer et al. (arXiv 2106.05237): a student that sees what its teacher sees gets better for very long, without
labels.

About 8 hours on one core: python experiments/lenet_targets.py --data-dir DIR. Writes results/lenet_targets.json
after every run, and goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import moved, moves, shifted
from common import environment, write, written
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.data import Data, load_data
from plasticnet.apps.models import LeNet5
from plasticnet.apps.scores import evaluate

ENDS = ("pruned", "grown", "known")
START, PERIODS = 3, 2  # units per site; schedule steps an epoch
RATE, GATE_RATE = 1e-3, 4e-2  # while gates move


@dataclass(frozen=True)
class Point:
    """An operating point: what it must reach, the budget that asks for it, and how long its stages are."""

    title: str
    error: float
    cost: str
    target: int
    budget: dict[str, float]
    network: str = "LeNet-5"
    inputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()  # of which modules single weights are gated,
    exclude: tuple[str, ...] = ()  # and which units are not
    growing: int = 6  # epochs more in the plastic stage of "grown"
    plastic: int = 8
    last: int = 30
    rate: float = 3e-3  # the highest of the last stage
    decay: float = 0.02
    temperature: float = 4.0
    teacher: float = 0.7  # the weight of its outputs in the loss
    taught_by: str = ""  # the network whose outputs these are, if it is not the dense one itself
    moved: int = 0  # by so many pixels images are moved at most, in the training of the dense network, too
    ends: tuple[str, ...] = ("pruned",)


POINTS = {
    "b": Point("LeNet-5, multiply-adds", 0.75, "macs", 217_000, {"macs": 217_000, "params": 20_000}, ends=ENDS),
    "a": Point("LeNet-5, multiply-adds", 1.00, "macs", 140_000, {"macs": 140_000, "params": 14_000}, ends=ENDS),
    "c": Point("LeNet-5, weights", 1.05, "weights", 2_700, {"params": 2_740}, inputs=("fc1",), plastic=14, last=64),
    "g": Point(
        "LeNet-5, weights, single ones within open units",
        1.05,
        "weights",
        2_700,
        {"params": 2_740},
        weights=("*",),
        plastic=12,
        last=40,
    ),
    "d": Point(
        "MLP 784-300-100, multiply-adds, units and features",
        1.60,
        "macs",
        9_000,
        {"macs": 9_000},
        "MLP",
        ("fc1",),
        plastic=20,
        last=50,
        rate=5e-3,
    ),
    "e": Point(
        "MLP 784-300-100, multiply-adds, single weights",
        1.60,
        "macs",
        9_000,
        {"macs": 9_000},
        "MLP",
        weights=("*",),
        exclude=("*",),
        plastic=15,
        last=50,
    ),
    "f": Point(  # 2 % of the weights, and all 410 biases
        "MLP 784-300-100, single weights",
        1.70,
        "weights",
        5_324,
        {"params": 5_734},
        "MLP",
        weights=("*",),
        exclude=("*",),
        plastic=15,
        last=50,
    ),
}

TWENTIETH = replace(
    POINTS["a"],
    title="LeNet-5, 5 % of the multiply-adds, longer, images moved",
    error=0.60,
    target=114_650,
    budget={"macs": 114_650},
    last=90,
    ends=("pruned",),
)
POINTS["k"] = replace(TWENTIETH, moved=2)
POINTS["m"] = replace(
    POINTS["k"], title=f"{TWENTIETH.title}, from the teacher alone, twice as long", last=180, teacher=1.0
)
POINTS["n"] = replace(TWENTIETH, title=f"{TWENTIETH.title} by one pixel", moved=1)
POINTS["l"] = replace(
    POINTS["d"],
    title=f"{POINTS['d'].title}, taught by LeNet-5, images moved",
    taught_by="LeNet-5",
    plastic=30,
    last=120,
    moved=1,
)


class LeNet(LeNet5):
    """LeNet-5 with dropout before its linear layers, for the dense network."""

    dropout = 0.5

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        x = self.pool(self.conv1(x)).relu()
        x = self.pool(self.conv2(x)).relu().flatten(1)
        x = self.fc1(F.dropout(x, self.dropout / 2, self.training)).relu()
        return self.fc2(F.dropout(x, self.dropout, self.training))


class MLP(nn.Module):
    """784-300-100-10 with dropout, for the dense network."""

    dropout = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        x = self.fc1(F.dropout(x.flatten(1), 0.4 * self.dropout, self.training)).relu()
        x = self.fc2(F.dropout(x, self.dropout, self.training)).relu()
        return self.fc3(F.dropout(x, self.dropout, self.training))


def answers(model: nn.Module, x: Tensor, by: int) -> Tensor:
    """A network's outputs for images moved down and to the right by as many pixels as the first two places say."""
    model.eval()
    places = range(2 * by + 1)

    def outputs(down: int, right: int) -> Tensor:
        parts = (shifted(part, by, *(torch.full((len(part),), n) for n in (down, right))) for part in x.split(1000))
        return torch.cat([model(part) for part in parts])

    with torch.no_grad():
        return torch.stack([torch.stack([outputs(down, right) for right in places]) for down in places])


# The networks: how to make one, and the epochs of the dense one.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {"LeNet-5": (LeNet, 10), "MLP": (MLP, 20)}


def one_cycle(step: int, steps: int, rate: float) -> float:
    """Up over the first tenth, then down along a cosine."""
    up = max(1, steps // 10)
    return rate * min((step + 1) / up, 0.5 + 0.5 * math.cos(math.pi * max(0, step - up) / max(1, steps - up)))


def dense(name: str, data: Data, seed: int, by: int = 0) -> tuple[nn.Module, Tensor, float]:
    """The dense network, its answers to the training images, and the CPU seconds; images are moved by some pixels."""
    make, epochs = NETWORKS[name]
    torch.manual_seed(seed)
    started, x, y = time.process_time(), data.train.x, data.train.y
    model = make().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    step, steps = 0, epochs * math.ceil(len(x) / 128)
    for _ in range(epochs):
        model.train()
        for i in torch.randperm(len(x)).split(128):
            optimizer.param_groups[0]["lr"] = one_cycle(step, steps, 2e-3)
            loss = F.cross_entropy(model(moved(x[i], by) if by else x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    outputs = answers(model, x, by)
    model.dropout = 0.0  # pyright: ignore[reportArgumentType]
    return model, outputs, time.process_time() - started


def run(
    point: Point, end: str, trained: nn.Module, taught: Tensor, data: Data, seed: int, widths: list[int]
) -> dict[str, Any]:
    """One network to its end; ``taught`` are the answers of a teacher, ``widths`` are those of a known one."""
    torch.manual_seed(seed)
    started, x, y = time.process_time(), data.train.x, data.train.y
    model = copy.deepcopy(trained)
    if end != "pruned":
        for layer in model.children():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    net = pn.PlasticNet(model, (x[:2],), inputs=point.inputs, weights=point.weights, exclude=point.exclude)
    if end == "grown":
        for name, site in net.sites.items():
            net.limit(name, maximum=len(site))
        pn.narrow(net, START)
    if end == "known":
        net.resize({name: range(width) for name, width in zip(net.sites, widths, strict=True)})
    optimizer = torch.optim.AdamW(net.param_groups(RATE, GATE_RATE, weight_decay=0.0))

    def losses(images: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        return pn.distillation(net(images), outputs, labels, temperature=point.temperature, weight=point.teacher)

    growth = pn.Growth() if end == "grown" else None
    plastic, ordinary = point.plastic, point.last
    if end == "grown":
        plastic += point.growing
    if end == "known":
        plastic, ordinary = 0, plastic + ordinary
    stages = [pn.Stage(plastic * PERIODS, 7.0), pn.Stage(ordinary * PERIODS)]
    budget = None if end == "known" else pn.Budget(**point.budget)
    schedule = pn.Schedule(net, optimizer, stages, growth=growth, budget=budget)
    step, steps = 0, ordinary * math.ceil(len(x) / 128)
    history = []
    while schedule.epoch < schedule.epochs:
        last = math.isinf(net.k)
        for part in torch.randperm(len(x)).chunk(PERIODS):
            net.train()
            for i in part.split(128):
                if last:
                    optimizer.param_groups[0].update(lr=one_cycle(step, steps, point.rate), weight_decay=point.decay)
                    step += 1
                if point.moved:
                    down, right = moves(len(i), point.moved)
                    batch = shifted(x[i], point.moved, down, right), taught[down, right, i], y[i]
                else:
                    batch = x[i], taught[0, 0, i], y[i]
                loss = net.expected_loss(partial(losses, *batch)) + schedule.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            val_loss, val_accuracy = evaluate(net, data.val)
            change = schedule.step(val_loss)
        size = net.summary()
        history.append({"units": [s.open for s in size.sites], "macs": size.open_macs, "val": val_accuracy})
        history[-1] |= {"parameters": size.open_parameters, "transition": change.transition}
    small = net.compact()
    size = net.summary()
    return {
        "units": [s.open for s in size.sites], "macs": size.open_macs, "parameters": size.open_parameters,
        "weights": sum(int(p.count_nonzero()) for p in small.parameters() if p.dim() > 1),
        "val_accuracy": evaluate(small, data.val)[1], "test_accuracy": evaluate(small, data.test)[1],
        "epochs": plastic + ordinary + NETWORKS[point.network][1],
        "cpu_seconds": time.process_time() - started, "history": history,
    }  # fmt: skip


def main() -> None:
    """All points, ends and seeds that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--points", nargs="+", default=list(POINTS))
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=list(ENDS))
    parser.add_argument("--name", default="lenet_targets", help="of the file in results")
    o = parser.parse_args()
    torch.set_num_threads(1)
    for seed, network in itertools.product(o.seeds, NETWORKS):
        wanted = [(p, e) for p in o.points for e in o.ends if POINTS[p].network == network and e in POINTS[p].ends]
        wanted = [(p, e) for p, e in wanted if (p, e, seed) not in {_key(r) for r in written(o.name)}]
        if not wanted:
            continue
        data = load_data("mnist", Path(o.data_dir), seed)
        teachers: dict[tuple[str, int], tuple[nn.Module, Tensor, float]] = {}
        for name, end in wanted:
            point = POINTS[name]
            keys = [(network, point.moved), (point.taught_by or network, point.moved)]
            for key in keys:
                if key not in teachers:
                    teachers[key] = dense(key[0], data, seed, key[1])
            trained, taught = teachers[keys[0]][0], teachers[keys[1]][1]
            error = 100 * (1 - evaluate(trained, data.test)[1])
            print(f"dense {network}, seed {seed}: {error:.2f} %", flush=True)
            seconds = sum(teachers[key][2] for key in set(keys))
            commit = environment()["commit"]  # of the code that is loaded
            widths = next((r["units"] for r in written(o.name) if _key(r) == (name, "pruned", seed)), [])
            found = run(point, end, trained, taught, data, seed, widths)
            found["cpu_seconds"] += seconds
            result = {"point": name, "end": end, "seed": seed, "dense_error": error, "commit": commit, **found}
            print({k: v for k, v in result.items() if k != "history"}, flush=True)
            results = sorted([*written(o.name), result], key=_key)  # read anew: another process may have written
            sys.argv = ["lenet_targets.py", "--data-dir", "DIR"]
            settings = {"points": {k: vars(p) for k, p in POINTS.items()}, "rate": RATE, "gate_rate": GATE_RATE}
            settings |= {"start": START, "periods": PERIODS, "batch": 128}
            write(o.name, settings, results)


def _key(r: dict[str, Any]) -> tuple[str, str, int]:
    return r["point"], r["end"], r["seed"]


if __name__ == "__main__":
    main()
