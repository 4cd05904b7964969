"""A compact network beside a hand-written one of the same widths: the operations that run, and their time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from cost_models import LENET, RESNET
from cost_steps import K, timed
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from plasticnet import PlasticNet

LEFT = {"LeNet-5": (5, 12, 90), "ResNet-20": (8, 16, 32)}
BATCHES = (1, 256)


@torch.no_grad()
def inference(repeats: int) -> list[dict[str, Any]]:
    """A row for each network and batch."""
    rows = []
    for network in (LENET, RESNET):
        widths = LEFT[network.name]
        net = PlasticNet(network.make(*network.widths), (network.data(2)[0],))
        net.k = K
        keep = network.sources([(n, len(s)) for n, s in net.sites.items()], widths)
        for name, site in net.sites.items():  # closed: all but as many as are to stay, at random
            site.phi[torch.randperm(len(site))[len(keep[name]) :]] *= -1
        models = {"compact": net.compact(), "hand-written": network.make(*widths).eval()}
        for batch in BATCHES:
            x, _ = network.data(batch)
            operations = {name: _operations(model, x) for name, model in models.items()}
            seconds = timed({name: lambda m=model, x=x: m(x) for name, model in models.items()}, repeats)
            row = {"network": network.name, "widths": widths, "batch": batch}
            rows.append({**row, "seconds": seconds, "operations": operations})
            print(network.name, batch, {n: f"{1000 * t['median']:.2f} ms" for n, t in seconds.items()}, flush=True)
    return rows


def _operations(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How often each operation of ATen runs, those that others call included."""
    model(x)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(x)
    return dict(sorted(Counter(e.name for e in found.events() if e.name.startswith("aten::")).items()))
