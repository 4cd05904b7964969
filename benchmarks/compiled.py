"""Whole prunings to half of the multiply-adds, as written and with `net.compile()`, the time of compiling included.

LeNet-5 on 3,000 images of MNIST and a ResNet-20 on 1,000 images of CIFAR-10, 30 epochs each, with one thread. Each run
has a process and an empty cache of the compiler to itself, and the two ways take turns. What counts is a whole process,
from its start to its end: on the clock, and in CPU seconds, with those of the processes that it starts to compile.

Beside them, what compiling takes and what a compiled step saves, at full size: with gates that are drawn, and in
ordinary training. These are CPU seconds; here the compiler works in a single process.

About fifteen minutes a seed: python benchmarks/compiled.py --data-dir DIR. DIR holds MNIST/raw, and
cifar10/train.parquet and test.parquet, which need pyarrow and pillow. Writes results/compiled.json row by row, and goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.data import load_data
from plasticnet.apps.models import LeNet5

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
import cifar  # noqa: E402
from common import environment  # noqa: E402

RESULTS = HERE / "results" / "compiled.json"
SETTINGS = {"epochs": 30, "plastic": (1, 20), "k": 7.0, "lr": 1e-3, "gate_lr": 2e-2, "macs": 0.5, "evaluated": 1000}
NETWORKS = {"LeNet-5": {"images": 3000, "batch": 64}, "ResNet-20": {"images": 1000, "batch": 100}}
STEPS = "steps"  # the third way: single steps
WAYS = ("as written", "compiled", STEPS)
REPEATS = 15  # how many steps are timed; the first ones, which prepare or compile, are not among them


def task(network: str, folder: Path, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A model, its images and labels, and those that it is evaluated on."""
    torch.manual_seed(seed)
    count = NETWORKS[network]["images"]
    if network == "LeNet-5":
        data = load_data("mnist", folder, seed)
        held = SETTINGS["evaluated"]
        return LeNet5(), (data.train.x[:count], data.train.y[:count]), (data.val.x[:held], data.val.y[:held])
    x, y = cifar.images(folder, "train", count + SETTINGS["evaluated"])
    return cifar.ResNet(20), (x[:count], y[:count]), (x[count:], y[count:])


def pruned(network: str, folder: Path, seed: int, way: str) -> dict[str, Any]:
    """Prune a network, and return what it ends with."""
    model, (x, y), (val_x, val_y) = task(network, folder, seed)
    net = pn.PlasticNet(model, (x[:2],))
    if way == "compiled":
        net.compile()
    optimizer = torch.optim.Adam(net.param_groups(SETTINGS["lr"], SETTINGS["gate_lr"]))
    begin, end = SETTINGS["plastic"]
    stages = [pn.Stage(begin), pn.Stage(end - begin, SETTINGS["k"]), pn.Stage(SETTINGS["epochs"] - end)]
    schedule = pn.Schedule(net, optimizer, stages, budget=pn.Budget(macs=SETTINGS["macs"]))
    full, started, epochs = net.summary().macs, time.perf_counter(), []
    while schedule.epoch < schedule.epochs:
        net.train()
        for i in torch.randperm(len(x)).split(NETWORKS[network]["batch"]):

            def losses(i: Tensor = i) -> Tensor:
                return F.cross_entropy(net(x[i]), y[i], reduction="none")

            optimizer.zero_grad()
            (net.expected_loss(losses) + schedule.penalty()).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            outputs = torch.cat([net(part) for part in val_x.split(NETWORKS[network]["batch"])])
        schedule.step(F.cross_entropy(outputs, val_y).item())
        epochs.append(round(time.perf_counter() - started - sum(epochs), 2))
    right = (net.compact()(val_x).argmax(1) == val_y).float().mean().item()
    return {"share_of_macs": net.summary().open_macs / full, "accuracy": right, "epoch_seconds": epochs}


def steps(network: str, folder: Path, seed: int) -> dict[str, Any]:
    """Return what steps take, as written and compiled, and what it takes to compile them."""
    found: dict[str, Any] = {}
    for kind, k in (("gates drawn", SETTINGS["k"]), ("ordinary training", math.inf)):
        model, (x, y), _ = task(network, folder, seed)
        net = pn.PlasticNet(model, (x[:2],)).train()
        net.k, batch = k, NETWORKS[network]["batch"]
        written = [step(net, x[:batch], y[:batch]) for _ in range(REPEATS + 2)][2:]
        net.compile(after=0)
        compiled = [step(net, x[:batch], y[:batch]) for _ in range(REPEATS + 2)]
        usual, fast = median(written), median(compiled[2:])
        found[kind] = {
            "written_ms": round(1000 * usual, 2), "compiled_ms": round(1000 * fast, 2),
            "compiling_seconds": round(sum(compiled[:2]) - 2 * fast, 1),
        }  # fmt: skip
    return {"kinds": found}


def step(net: pn.PlasticNet, x: Tensor, y: Tensor) -> float:
    """Take a step without an optimizer, and return its CPU seconds, with those of the compiler's processes."""
    started = cpu_seconds(resource.RUSAGE_SELF) + cpu_seconds(resource.RUSAGE_CHILDREN)
    net.zero_grad()
    net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")).backward()
    return cpu_seconds(resource.RUSAGE_SELF) + cpu_seconds(resource.RUSAGE_CHILDREN) - started


def cpu_seconds(whose: int) -> float:
    """The CPU seconds of this process, or of those that it has started and that have ended."""
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def measured(network: str, folder: Path, seed: int, way: str) -> dict[str, Any]:
    """What a run in a process of its own takes and ends with."""
    command = [sys.executable, __file__, "--data-dir", str(folder), "--one", network, way, "--seeds", str(seed)]
    load, before, started = os.getloadavg()[0], cpu_seconds(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        if way == STEPS:
            env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # others are no children of the process that is measured
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, cpu = time.perf_counter() - started, cpu_seconds(resource.RUSAGE_CHILDREN) - before
    times = {"wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "load_before": round(load, 2)}
    return {**times, "load_after": round(os.getloadavg()[0], 2), **json.loads(output.splitlines()[-1])}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY"), help="a single run, in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        network, way = options.one
        one = steps(network, options.data_dir, options.seeds[0]) if way == STEPS else None
        print(json.dumps(one or pruned(network, options.data_dir, options.seeds[0], way)))
        return
    rows = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []
    for seed, network, way in product(options.seeds, NETWORKS, WAYS):
        what = {"network": network, "seed": seed, "way": way}
        if any(all(row[key] == value for key, value in what.items()) for row in rows):
            continue
        e = environment()
        of = {key: e[key] for key in ("commit", "date", "torch", "python")}
        rows.append({**what, **measured(network, options.data_dir, seed, way), **of})
        print({k: v for k, v in rows[-1].items() if k != "epoch_seconds"}, flush=True)
        content = {"environment": e, "settings": {**SETTINGS, "networks": NETWORKS}, "results": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
