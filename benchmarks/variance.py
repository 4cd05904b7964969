"""How noisy the gradient of the gates is, for every estimator, and what its step costs.

LeNet-5 on MNIST (570 gates, batch 128) after an epoch of ordinary training and another one under the gates at
which it is measured: mid-way (pi spread around 0.7) and polarised. The variance is summed over the gates,
over repeated draws for one batch; the reference gradient is the mean over many draws of an unbiased
estimator. Steps are timed in turns, in processor time with one thread, by the code of benchmarks/cost.py.

About 12 minutes: python benchmarks/variance.py --data-dir DIR. Writes results/variance.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cost_models import LENET, RESNET, Network
from cost_steps import BATCH, K, gated, gated_step, plain_step, timed
from torch import Tensor

from plasticnet import ESTIMATORS, PlasticNet
from plasticnet.apps.data import Split, load_data
from plasticnet.apps.models import LeNet5

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))

DRAWS, REFERENCE = 60, 600
STATES = {"mid-way": (1.0, 0.0), "polarised": (1.0, 4.0)}  # spread of the logits of pi, and how far they lie from 0


def gates(state: str, units: int) -> Tensor:
    """Probabilities (units,): around 0.7, or 70 % of them near 1 and the others near 0."""
    spread, far = STATES[state]
    middle = torch.full((units,), 0.85) if not far else torch.where(torch.rand(units) < 0.7, far, -far)
    return torch.sigmoid(middle + spread * torch.randn(units))


def trained(state: str, train: Split) -> PlasticNet:
    """LeNet-5 after an epoch at k = infinity and one under these gates, which do not move."""
    net = PlasticNet(LeNet5(), (train.x[:2],), gates="sample", estimator="straight-through")
    optimizer = torch.optim.Adam(net.model.parameters(), 1e-3)
    for k in (float("inf"), K):
        if k == K:
            with torch.no_grad():
                pi = gates(state, sum(len(s) for s in net.sites.values()))
                for site, p in zip(net.sites.values(), pi.split([len(s) for s in net.sites.values()]), strict=True):
                    site.phi.copy_(p.logit() / K)
        net.k = k
        net.train()
        for index in torch.randperm(len(train)).split(BATCH):
            x, y = train.x[index], train.y[index]
            loss = net.expected_loss(lambda x=x, y=y: F.cross_entropy(net(x), y, reduction="none"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def estimates(net: PlasticNet, x: Tensor, y: Tensor, draws: int) -> Tensor:
    """Estimates of the gates' gradient for one batch, shape (draws, units)."""
    phi = [s.phi for s in net.sites.values()]
    found = []
    for _ in range(draws):
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        found.append(torch.cat(torch.autograd.grad(loss, phi)))
    return torch.stack(found)


def variances(seed: int, train: Split) -> list[dict[str, Any]]:
    """A row for every state, estimator and kind of gates."""
    rows = []
    for state in STATES:
        torch.manual_seed(seed)
        net = trained(state, train)
        x, y = train.x[:BATCH], train.y[:BATCH]
        net.sampler.estimator, net.sampler.mode = "bitflip-cv", "sample"
        truth = estimates(net, x, y, REFERENCE)
        norm = truth.mean(0).square().sum()
        for name in ESTIMATORS:
            for mode in ("batch", "sample"):
                net.sampler.estimator, net.sampler.mode = name, mode
                found = estimates(net, x, y, DRAWS)
                off = float((found.mean(0) - truth.mean(0)).square().sum())
                row = {"seed": seed, "state": state, "estimator": name, "gates": mode}
                row |= {"variance": float(found.var(0).sum()), "distance": off, "gradient": float(norm)}
                row |= {"noise_of_distance": float(found.var(0).sum() / DRAWS + truth.var(0).sum() / REFERENCE)}
                rows.append(row)
                print(row, flush=True)
    return rows


def times(network: Network, repeats: int) -> dict[str, dict[str, float]]:
    """Processor time of a training step, with all units open."""
    variants = {"plain": plain_step(network, network.widths)}
    for name in ESTIMATORS:
        for mode in ("batch", "sample"):
            net, optimizer = gated(network, network.widths, network.widths)
            net.k, net.sampler.estimator, net.sampler.mode = K, name, mode
            variants[f"{name} {mode}"] = gated_step(net, optimizer, network)
    return timed(variants, repeats)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    from common import environment

    torch.set_num_threads(1)
    sys.argv = ["variance.py", "--data-dir", "DIR", "--seeds", *map(str, options.seeds)]
    before = environment()
    train = load_data("mnist", options.data_dir, 0).train
    rows = [row for seed in options.seeds for row in variances(seed, train)]
    torch.manual_seed(0)
    seconds = {n.name: times(n, options.repeats) for n in (LENET, RESNET)}
    content = {
        "environment": {**before, "load_after": os.getloadavg()[0]},
        "settings": {"draws": DRAWS, "reference": REFERENCE, "batch": BATCH, "k": K, "seeds": options.seeds},
        "results": {"variances": rows, "seconds": seconds},
    }
    (HERE / "results" / "variance.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
