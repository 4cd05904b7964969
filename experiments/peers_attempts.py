"""What was tried to get further than peers.py does at a tenth of the multiply-adds, on validation data.

All attempts begin with the wide network of a task, have the epochs that every way has there, and learn from the wide
network's outputs. They differ in how units are chosen, in how many steps they go, and in the weights that the training
begins with. The seeds are those for tuning, which peers.py does not measure, and no test data are read.

Half an hour on one core: python experiments/peers_attempts.py --data-dir DIR. Adds rows to results/peers_attempts.json
and goes on from there; peers_table.py makes the table of docs/peers.md.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import known, write, written
from peers import started, widths_of
from peers_tasks import TASKS
from peers_training import Start, by_scores, gated, train
from peers_ways import gates
from pruning import operations
from torch import nn

import plasticnet as pn

NAME, SHARE, SEEDS = "peers_attempts", 0.1, (100, 101, 102)
RATES = {"housing": (8e-3, 32e-3), "Fashion-MNIST": (8e-3,)}
Attempt = Callable[[Start, float], nn.Module]  # from the wide network and the largest learning rate


def _shrunk(start: Start, model: nn.Module, share: float) -> nn.Module:
    """What `pn.shrink` makes of a network, for a share of the wide network's multiply-adds."""
    x = start.task.parts[0][0]
    most = share * operations(start.dense, x)
    return pn.shrink(model, x[start.chosen()].split(128), pn.Budget(macs=most))[0]


def in_steps(start: Start, rate: float, steps: int) -> nn.Module:
    """`pn.shrink` in steps of equal ratio, each followed by as many epochs."""
    small, left = start.dense, start.task.epochs
    for step in range(1, steps + 1):
        small = _shrunk(start, small, SHARE ** (step / steps))
        epochs = left // (steps + 1 - step)
        train(start.task, small, epochs, rate, start.taught)
        left -= epochs
    return small


def by_magnitude(start: Start, rate: float) -> nn.Module:
    """The units with the largest weights stay, and what reads them is repaired."""
    net = gated(start)
    pn.prune_once(net, pn.Budget(macs=SHARE), scores="magnitude", per_cost=False, cut=False)
    pn.repair(net, start.task.parts[0][0][start.chosen()].split(128))
    small = net.compact()
    train(start.task, small, start.task.epochs, rate, start.taught)
    return small


def not_repaired(start: Start, rate: float) -> nn.Module:
    """The units with the largest weights stay, as they are."""
    net = gated(start)
    small = by_scores(net, pn.scores(net, "magnitude"), SHARE)
    train(start.task, small, start.task.epochs, rate, start.taught)
    return small


def mixed(start: Start, rate: float, own: float, random: float) -> nn.Module:
    """`pn.shrink`, and then weights that are a mixture of its own and of random ones (arXiv 1910.08475)."""
    small = _shrunk(start, start.dense, SHARE)
    fresh = copy.deepcopy(small)
    for module in fresh.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    with torch.no_grad():
        for p, q in zip(small.parameters(), fresh.parameters(), strict=True):
            p.mul_(own).add_(q, alpha=random)
    train(start.task, small, start.task.epochs, rate, start.taught)
    return small


def learned(start: Start, rate: float) -> nn.Module:
    """Gates that learn for half of the epochs, as in peers.py."""
    return gates(start, SHARE, {"rate": rate}, {})


ATTEMPTS: dict[str, Attempt] = {
    "shrink": partial(in_steps, steps=1),
    "shrink in two steps": partial(in_steps, steps=2),
    "shrink in three steps": partial(in_steps, steps=3),
    "largest weights": not_repaired,
    "largest weights, repaired": by_magnitude,
    "gates": learned,
    "shrink, weights halved": partial(mixed, own=0.5, random=0.0),
    "shrink, halfway to random weights": partial(mixed, own=0.5, random=0.5),
    "shrink, random weights": partial(mixed, own=0.0, random=1.0),
}


def measure(start: Start, todo: list[dict[str, Any]]) -> None:
    """All attempts of a task that begin with a wide network."""
    for key in todo:
        torch.manual_seed(start.seed + 1)
        begun = time.process_time()
        small = ATTEMPTS[key["attempt"]](start, key["rate"])
        seconds = time.process_time() - begun
        row = {**key, "seconds": seconds, "validation": start.task.error(small, start.task.parts[1])}
        row |= {"widths": widths_of(start, small), "parameters": sum(p.numel() for p in small.parameters())}
        print(row, flush=True)
        write(NAME, {"share": SHARE}, [*written(NAME), row])


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=list(RATES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.tasks:
        task = TASKS[name](options.data_dir)
        for seed in SEEDS:
            todo = [
                key
                for rate in RATES[name]
                for attempt in ATTEMPTS
                if not known(NAME, **(key := {"task": name, "seed": seed, "rate": rate, "attempt": attempt}))
            ]
            if todo:
                measure(started(task, seed)[0], todo)


if __name__ == "__main__":
    main()
