"""A soak: a long training with hundreds of changes of size must leave nothing behind.

``make soak`` runs ``python benchmarks/soak_long.py``. A small network is trained, and brought to widths drawn at random
in between, so that units are cut as often as they are added. Every so often it is brought to its first size, and then
everything that must not grow is measured: the memory of the process and of Python's objects, tensors, hooks, open files
and the time of a step. The first of these measurements are left out as a warm-up. soak_table.py writes docs/soak.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
RESULT = HERE / "results" / "soak_long.json"

WIDTH, NARROWEST, WIDEST = 16, 4, 32
TIMED = 20  # steps, at the first size, of which the median is taken
MOMENTS = 20  # how often everything is measured


def network() -> tuple[pn.PlasticNet, torch.optim.Optimizer]:
    """Return a small network with the kinds of layers whose tensors a resize replaces, and its optimizer."""
    layers = [nn.Conv2d(1, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    net = pn.PlasticNet(model, (torch.randn(4, 1, 8, 8),))
    net.k = 7.0
    return net, torch.optim.Adam(net.param_groups(1e-3))


def train(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """Take one training step, and return how many milliseconds it took."""
    begun = time.perf_counter()
    loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + net.penalty(1e-4)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return 1e3 * (time.perf_counter() - begun)


def resize(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, draw: random.Random, width: int | None = None) -> None:
    """Bring every site to a width, by default one at random, by units at random."""
    sources: dict[str, list[int]] = {}
    for name, site in net.sites.items():
        wanted = draw.randint(NARROWEST, WIDEST) if width is None else width
        kept = sorted(draw.sample(range(len(site)), min(wanted, len(site), draw.randint(1, WIDEST))))
        sources[name] = kept + [-1] * (wanted - len(kept))
    net.resize(sources, optimizer)


def measured(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, step_ms: float) -> dict[str, float]:
    """Return everything that must not grow, at the first size of the network."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "resident MiB": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "Python's KiB": tracemalloc.get_traced_memory()[0] / 2**10,
        "tensors": len(tensors),
        "their KiB": sum(t.untyped_storage().nbytes() for t in tensors) / 2**10,
        "states of the optimizer": len(optimizer.state),
        "hooks": sum(len(getattr(m, h)) for m in net.modules() for h in hooks),
        "open files": len(os.listdir("/proc/self/fd")),
        "ms of a step": step_ms,
    }


def verdicts(rows: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return for everything what it was at first and at last, and whether it grew.

    A median over the first third of the measurements is compared with one over the last third. What is counted may not
    grow at all. Memory may grow by 2 % and 64 KiB, because Python keeps some small objects to use them again, and the
    time of a step by half, since other programs run beside this one.
    """
    third, found = max(1, len(rows) // 3), dict[str, dict[str, Any]]()
    for name in rows[0]:
        first, last = (median(r[name] for r in some) for some in (rows[:third], rows[-third:]))
        factor = 1.5 if name.startswith("ms") else 1.02 if "iB" in name else 1.0
        spare = 64 if name.endswith("KiB") else 0
        found[name] = {"first": first, "last": last, "grew": last > factor * first + spare}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Train, and return 1 where something has grown."""
    from common import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24_000, help="how many training steps")
    parser.add_argument("--resizes", type=int, default=500, help="how many changes of size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
    net, optimizer = network()
    tracemalloc.start()
    every, per = max(1, options.resizes // MOMENTS), max(1, options.steps // options.resizes)
    rows: list[dict[str, float]] = []
    for number in range(1, options.resizes + 1):
        whole = number % every == 0
        resize(net, optimizer, draw, WIDTH if whole else None)
        times = [train(net, optimizer, x, y) for _ in range(per)]
        if whole:
            rows.append(measured(net, optimizer, median(times[-TIMED:])))
            print(number, {k: round(v, 1) for k, v in rows[-1].items()}, flush=True)
    rows = rows[min(2, len(rows) // 3) :]
    found = verdicts(rows)
    settings = {"steps": options.resizes * per, "resizes": options.resizes, "seed": options.seed}
    settings |= {"narrowest": NARROWEST, "widest": WIDEST}
    result = {"environment": environment(), "settings": settings, "found": found, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    grew = [name for name, f in found.items() if f["grew"]]
    print("what grew:", ", ".join(grew) or "nothing")
    return int(bool(grew))


if __name__ == "__main__":
    sys.exit(main())
