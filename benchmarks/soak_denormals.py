"""A soak: numbers next to zero that training leaves in closed units must not slow the module down that is cut from it.

``make soak`` runs ``python benchmarks/soak_denormals.py`` beside the other soaks. Half of the units of a network are
closed, and it trains on with weight decay until the weights of these units, which have no gradient, are below the
normal numbers of float32. Processors may compute many times slower with such numbers; how much slower single products
are shows whether this one minds at all. The compact module is timed against one of the same widths whose weights were
drawn anew, in turns, and so is the network at its full width. soak_table.py writes docs/soak.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init

import plasticnet as pn

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
RESULT = HERE / "results" / "soak_denormals.json"

ALLOWED = 1.25  # how many times slower counts as slower, as other programs run beside this one
LR, DECAY = 0.01, 2.5  # of AdamW: a weight without a gradient is multiplied by 1 - LR * DECAY in every step


def perceptron() -> nn.Module:
    """Return a multilayer perceptron."""
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def convolutions() -> nn.Module:
    """Return a small convolutional network without norms, on images that are read from vectors."""
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"perceptron": perceptron, "convolutions": convolutions}


def subnormal(module: nn.Module) -> int:
    """Return how many weights are not zero and below the normal numbers of their type."""
    return sum(int(((p != 0) & (p.abs() < torch.finfo(p.dtype).tiny)).sum()) for p in module.parameters())


def trained(make: Callable[[], nn.Module], steps: int, x: Tensor, y: Tensor) -> pn.PlasticNet:
    """Return a network half of whose units are closed, after training with weight decay."""
    torch.manual_seed(0)
    net = pn.PlasticNet(make(), (x[:2],))
    net.k = float("inf")
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[::2] = -1.0
    optimizer = torch.optim.AdamW(net.model.parameters(), LR, weight_decay=DECAY)
    for _ in range(steps):
        i = torch.randint(len(x), (32,))
        loss = F.cross_entropy(net.train()(x[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def drawn_anew(module: nn.Module) -> nn.Module:
    """Return a copy of a module with other weights, none of which is next to zero."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters():
            init.uniform_(p, 0.01, 0.05)
    return twin


def times(modules: list[nn.Module], x: Tensor, rounds: int) -> list[float]:
    """Return the milliseconds of a forward pass of each module, the median over rounds in which they take turns.

    Every other round goes the other way, because it matters what ran before.
    """
    found: list[list[float]] = [[] for _ in modules]
    with torch.no_grad():
        for number in range(rounds):
            for module, own in list(zip(modules, found, strict=True))[:: (-1) ** number]:
                begun = time.perf_counter()
                module(x)
                own.append(1e3 * (time.perf_counter() - begun))
    return [median(own) for own in found]


def measured(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Return what was found for one network."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float() / 16, torch.tensor(classes)
    net = trained(NETWORKS[name], steps, x, y)
    full, small = copy.deepcopy(net.model).eval(), net.compact()
    batch = x[:64]
    with torch.no_grad():
        right = float((small(x).argmax(1) == y).float().mean())
    cut, cut_anew = times([small, drawn_anew(small)], batch, rounds)
    whole, whole_anew = times([full, drawn_anew(full)], batch, rounds)
    return {
        "network": name, "right": right, "before": subnormal(full), "after": subnormal(small), "ms": cut,
        "ms, drawn anew": cut_anew, "ms at full width": whole, "ms at full width, drawn anew": whole_anew,
        "slower": cut > ALLOWED * cut_anew,
    }  # fmt: skip


def minds(rounds: int) -> float:
    """Return how many times longer this processor takes for products that are next to zero than for others."""

    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    ms = times([Scaled(1e-41), Scaled(0.5)], torch.rand(2**16) + 0.5, rounds)
    return ms[0] / ms[1]


def main(arguments: list[str] | None = None) -> int:
    """Measure all networks, and return 1 where one is slower than it would be with other weights."""
    from common import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3700, help="how many training steps with weight decay")
    parser.add_argument("--rounds", type=int, default=400, help="how often each module runs")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {"steps": options.steps, "rounds": options.rounds, "allowed": ALLOWED, "lr": LR, "decay": DECAY},
        "minds": minds(options.rounds),
        "rows": [],
    }
    for name in NETWORKS:
        result["rows"].append(measured(name, options.steps, options.rounds))
        print(result["rows"][-1], flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["slower"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
