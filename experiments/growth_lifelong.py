"""Networks whose data come class by class, with replay of old ones: what they keep, and how large they become.

In the first stage there are the first classes only, and each further stage adds some. "lifelong" grows from 3 units a
site, is pruned under the linear price, and wakes for each stage (`Schedule.wake`). "dense" is a wide network that goes
on training with the same data. Old images stay at hand, all of them or a tenth (``--replay``). "at once" networks,
grown or dense, train on all classes from the beginning, for as many epochs as all stages together.

It takes twenty minutes on one core: python experiments/growth_lifelong.py --data-dir DIR. Writes
results/growth_lifelong.json; what is there is not run again, unless it was grown by another rule. Test data are read at
the end of a stage; the accuracy after each epoch is that on validation data.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from growth_price import GATE_RATE, K, network
from growth_rows import path, row
from growth_tasks import Part, Task, task
from torch import Tensor

import plasticnet as pn

NAME, START = "growth_lifelong", 3
# How many classes there are in each stage, and the epochs of a stage.
COURSES = {"digits": ((5, 10), 60), "fashion": ((4, 7, 10), 20)}


@dataclass(frozen=True)
class Life:
    """How one network lives.

    Attributes:
        bounds: How many classes there are in each stage; those of "at once" have one stage.
        grows: Whether the network grows and is pruned, or is wide and stays as it is.
        replay: The share of the images of old classes that stay at hand.
        epochs: The epochs of a stage.
        groups: How many classes there are in each stage of "lifelong", by which all networks are judged.
    """

    bounds: Sequence[int]
    grows: bool
    replay: float
    epochs: int
    groups: Sequence[int]


def at_hand(y: Tensor, before: int, now: int, replay: float) -> Tensor:
    """The indices of images of new classes, and of the first images of each old one, as far as they stay at hand."""
    kept = [i[: round(replay * len(i))] for i in ((y == c).nonzero()[:, 0] for c in range(before))]
    return torch.cat([*kept, ((y >= before) & (y < now)).nonzero()[:, 0]])


@torch.no_grad()
def right(net: pn.PlasticNet, part: Part, begin: int, end: int, outputs: int) -> float:
    """The accuracy on some classes, in percent, where the answer is one of the first outputs."""
    chosen = ((part[1] >= begin) & (part[1] < end)).nonzero()[:, 0]
    net.eval()
    answers = torch.cat([net(part[0][i])[:, :outputs].argmax(1) for i in chosen.split(1000)])
    return 100 * float(answers.eq(part[1][chosen]).float().mean())


def judged(net: pn.PlasticNet, test: Part, groups: Sequence[int], now: int) -> dict[str, Any]:
    """Accuracies on the test data: of all classes so far, and of those that came in each stage.

    "then" are those of each stage's classes among the classes that the network knew at the end of that stage.
    Forgetting lowers them, and new classes that look like old ones do not.
    """
    seen = [(a, b) for a, b in pairwise((0, *groups)) if b <= now]
    return {
        "all": right(net, test, 0, now, groups[-1]),
        "stages": [right(net, test, a, b, groups[-1]) for a, b in seen],
        "then": [right(net, test, a, b, b) for a, b in seen],
    }


def lived(task: Task, life: Life, seed: int) -> dict[str, Any]:
    """One network through all stages."""
    net = network(task, seed, start=START if life.grows else None)
    optimizer = torch.optim.Adam(net.param_groups(task.rate, GATE_RATE))
    hardened = life.epochs // 5
    stages = [pn.Stage(life.epochs - hardened, k=K), pn.Stage(hardened)] if life.grows else [pn.Stage(life.epochs)]
    growth, pressure = (pn.Growth(), pn.Pressure(task.price, "parameters")) if life.grows else (None, None)
    schedule = pn.Schedule(net, optimizer, stages, growth=growth, pressure=pressure)
    (x, y), validation, test = task.parts
    found = []
    for before, now in pairwise((0, *life.bounds)):
        if before:
            schedule.wake(None if life.grows else stages)
        here, begun, peak, widths, kept = at_hand(y, before, now, life.replay), time.process_time(), 0, [], []
        while schedule.epoch < schedule.epochs:
            net.train()
            for i in here[torch.randperm(len(here))].split(task.batch):
                loss = net.expected_loss(lambda i=i: task.losses(net(x[i]), y[i]))
                optimizer.zero_grad()
                (loss + schedule.penalty()).backward()
                optimizer.step()
            schedule.step()
            peak = max(peak, net.summary().parameters)
            widths.append("-".join(str(len(s)) for s in net.sites.values()))
            kept.append(right(net, validation, 0, before or now, life.groups[-1]))
        seconds, size = time.process_time() - begun, net.summary()
        found.append({
            "classes": now, "units": {s.name: s.open for s in size.sites}, "parameters": size.open_parameters,
            "peak": peak, "seconds": seconds, "widths": path(widths),
            "old on validation data": " ".join(f"{a:.1f}" for a in kept), **judged(net, test, life.groups, now),
        })  # fmt: skip
    return {"stages": found}


def lives(name: str, replays: Sequence[float]) -> dict[tuple[str, float | None], Life]:
    """What is run on a task, by way and replay."""
    bounds, epochs = COURSES[name]
    once = Life(bounds[-1:], True, 1.0, epochs * len(bounds), bounds)
    found: dict[tuple[str, float | None], Life] = {}
    for replay in replays:
        found["lifelong", replay] = Life(bounds, True, replay, epochs, bounds)
        found["dense", replay] = Life(bounds, False, replay, epochs, bounds)
    return {**found, ("grown at once", None): once, ("dense at once", None): replace(once, grows=False)}


def main() -> None:
    """All ways on all tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(COURSES))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--replay", type=float, nargs="+", default=[1.0, 0.1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"start": START, "courses": COURSES, "gate rate": GATE_RATE, "k": K}
    for name in options.tasks:
        chosen = task(name, options.data_dir)
        for seed in range(options.seeds):
            for (way, replay), life in lives(name, options.replay).items():
                key = {"task": name, "way": way, "replay": replay, "seed": seed}
                row(NAME, settings, key, partial(lived, chosen, life, seed), life.grows)


if __name__ == "__main__":
    main()
