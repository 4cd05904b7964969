"""Ways to a smaller network at equal data, epochs, tuning and distillation: six tasks, four budgets, three seeds.

A wide network is trained for each seed. Every way then has the same number of epochs of the same training, in which it
also learns from the wide network's outputs, to reach a share of its multiply-adds. The time of the wide network counts
in all of them. Each way has six settings to choose from, or fourteen (peers_ways.py), and takes the one whose error on
validation data is smallest at the second smallest budget on seed 100, which is not measured. Test data are read once a
run.

Two ways are plasticnet's: `pn.shrink`, and gates that learn under a budget. "same widths" knows the widths that
`pn.shrink` has found, and starts from random weights with the epochs of both trainings together.

A run takes some seconds to two minutes on one core, all of them some eight hours: python experiments/peers.py
--data-dir DIR. Adds rows to results/peers_TASK.json after each run, and goes on from there, so that processes may
measure tasks side by side. It needs the extra "peers".
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import environment, write, written
from peers_standing import TUNING, chosen
from peers_tasks import TASKS, Task
from peers_training import Start, gated, train
from peers_ways import OURS, PEERS, SETTINGS, SHRINK, WIDE, made
from pruning import operations
from torch import nn

KEPT = 20_000  # as many outputs of the wide network are kept at most


def started(task: Task, seed: int) -> tuple[Start, float]:
    """The wide network, trained, and the CPU seconds that this took."""
    torch.manual_seed(seed)
    begun, dense, x = time.process_time(), task.build(), task.parts[0][0]
    plain = Start(task, dense, None, seed)
    train(task, dense, task.dense, task.rate, plain.labelled)
    outputs = None
    if len(x) <= KEPT:
        with torch.no_grad():
            outputs = torch.cat([dense(part) for part in x.split(1000)])
    return Start(task, dense.eval(), outputs, seed), time.process_time() - begun


@torch.no_grad()
def latency(task: Task, dense: nn.Module, small: nn.Module) -> dict[str, float]:
    """Milliseconds of CPU time for 128 inputs, of both networks in turn: medians of nine."""
    x, times = task.parts[2][0][:128], {"dense": [], "small": []}
    for network in (dense, small):
        network.eval()
        network(x)
    for _ in range(9):
        for name, network in (("dense", dense), ("small", small)):
            begun = time.process_time()
            network(x)
            times[name].append(1000 * (time.process_time() - begun))
    return {name: median(found) for name, found in times.items()}


def widths_of(start: Start, small: nn.Module) -> dict[str, int]:
    """The widths of a small network, site by site."""
    sizes = dict(small.named_parameters())
    found = {}
    for name, site in gated(start).sites.items():
        made_by = next(s for s in site.units.slices if not s.consumed)
        found[name] = sizes[made_by.tensor].shape[made_by.dim] // made_by.index.shape[1]
    return found


def run(way: str, start: Start, share: float, setting: dict[str, Any], widths: dict[str, int]) -> dict[str, Any]:
    """One run: the small network, and what is measured of it. The errors are of validation and test data."""
    torch.manual_seed(start.seed + 1)
    begun = time.process_time()
    try:
        small = made(way, start, share, setting, widths)
    except Exception as error:  # a peer may not be able to do it; the row says so
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    seconds = time.process_time() - begun
    task = start.task
    return {
        "widths": widths_of(start, small),
        "macs": operations(small, task.parts[0][0]) / operations(start.dense, task.parts[0][0]),
        "parameters": sum(p.numel() for p in small.parameters()),
        "validation": task.error(small, task.parts[1]),
        "test": task.error(small, task.parts[2]),
        "latency": latency(task, copy.deepcopy(start.dense), small),
        "seconds": seconds,
    }


def file_of(task: str) -> str:
    """The name of the results of a task."""
    return f"peers_{task.lower()}"


def rows_of(task: str, **what: Any) -> list[dict[str, Any]]:
    """The rows of a task that are there with these values."""
    return [r for r in written(file_of(task)) if all(r.get(k) == v for k, v in what.items())]


def pruning_version() -> str:
    """The version of Torch-Pruning, where it is installed."""
    try:
        return metadata.version("torch-pruning")
    except metadata.PackageNotFoundError:
        return ""


def add(row: dict[str, Any]) -> None:
    """Write a row."""
    row["commit"] = environment()["commit"]
    row["load"] = environment()["load"]
    print({k: v for k, v in row.items() if k not in ("widths", "commit")}, flush=True)
    settings = {"settings": SETTINGS, "tuning seed": TUNING, "torch-pruning": pruning_version()}
    name = file_of(row["task"])
    write(name, settings, [*written(name), row])


def setting_of(name: str, way: str) -> dict[str, Any] | None:
    """The setting that is best on validation data, or None where none works."""
    best = chosen(rows_of(name, way=way)).get((name, way))
    return best["setting"] if best else None


def measure(name: str, task: Task, seed: int, ways: tuple[str, ...], budgets: tuple[float, ...]) -> None:
    """All ways on one seed: with all settings on the seed for tuning, else with the ones that were chosen."""
    tuning = seed == TUNING
    todo = []
    for way in ways:
        for share in (1.0,) if way == WIDE else budgets:
            settings = SETTINGS[way] if tuning else [setting_of(name, way)]
            for setting in settings:
                key = {"task": name, "way": way, "share": share, "seed": seed, "setting": setting}
                if setting is not None and not rows_of(**key):
                    todo.append(key)
    if not todo:
        return
    start, seconds = started(task, seed)
    if not rows_of(name, way="dense", seed=seed):
        errors = {"validation": task.error(start.dense, task.parts[1]), "test": task.error(start.dense, task.parts[2])}
        size = sum(p.numel() for p in start.dense.parameters())
        row = {"task": name, "way": "dense", "seed": seed, "share": 1.0, "macs": 1.0, "parameters": size, **errors}
        add(
            {
                **row,
                "multiply-adds": operations(start.dense, task.parts[0][0]),
                "seconds": 0.0,
                "dense_seconds": seconds,
            }
        )
    for key in todo:
        ours = [r for r in rows_of(name, way=SHRINK, share=key["share"], seed=seed) if "failed" not in r]
        widths = ours[0]["widths"] if ours else {}  # those before the training, which the settings do not change
        found = run(key["way"], start, key["share"], key["setting"], widths)
        add({**key, **found, "dense_seconds": seconds})


def main() -> None:
    """Run what is not there yet: first the seed for tuning, then the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ways", nargs="+", choices=SETTINGS, default=[WIDE, *OURS, *PEERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 1, 2, 3], help="0 is the largest")
    parser.add_argument("--all", action="store_true", help="all ways, and not only those of the full grid")
    options = parser.parse_args()
    ways = tuple(SETTINGS) if options.all else tuple(options.ways)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.tasks:
        task = TASKS[name](options.data_dir)
        for seed in (TUNING, *options.seeds):
            budgets = (2,) if seed == TUNING else options.budgets
            measure(name, task, seed, ways, tuple(task.shares[b] for b in budgets))


if __name__ == "__main__":
    main()
