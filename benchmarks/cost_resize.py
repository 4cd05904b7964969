"""What it costs to change the size of ResNet-50, with the state of Adam, beside one of its training steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cost_steps import PENALTY, RATE, K, spread
from torch import Tensor

from plasticnet import PlasticNet

SHARE = 0.1  # of each site, cut and added again
BATCH = 8
SLOWEST = 7  # repeats at most: a step takes seconds


def resize(repeats: int) -> list[dict[str, Any]]:
    """One row: a plain step, cutting a tenth of the units of every site, and growing them back, in turns."""
    from torchvision.models import resnet50

    x, y = torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))
    net = PlasticNet(resnet50(), (torch.randn(2, 3, 64, 64),)).train()
    optimizer = torch.optim.Adam(net.param_groups(lr=RATE, gate_lr=RATE))
    widths = {name: len(site) for name, site in net.sites.items()}
    cut = {name: int(SHARE * n) for name, n in widths.items()}

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    net.k = K  # one step of stage 2, so that Adam has state for the gates too
    update(net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + net.penalty(**PENALTY))
    phases: dict[str, Callable[[], object]] = {
        "step": lambda: update(F.cross_entropy(net.model(x), y)),
        "prune": lambda: net.resize(
            {name: sorted(torch.randperm(n)[cut[name] :].tolist()) for name, n in widths.items()}, optimizer
        ),
        "grow": lambda: net.grow(cut, optimizer, init="random"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    for i in range(min(repeats, SLOWEST) + 1):
        for name, phase in phases.items():
            begin = time.process_time()
            phase()
            if i:  # the first is the warm-up
                seconds[name].append(time.process_time() - begin)
        assert {name: len(site) for name, site in net.sites.items()} == widths
    times = {name: spread(values) for name, values in seconds.items()}
    print("ResNet-50", {n: f"{1000 * t['median']:.0f} ms" for n, t in times.items()}, flush=True)
    parameters = sum(p.numel() for p in net.model.parameters())
    return [{"network": "ResNet-50", "batch": BATCH, "parameters": parameters, "seconds": times}]
