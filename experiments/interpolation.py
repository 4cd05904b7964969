"""From dropout to ordinary training by one number: k from 0 to infinity on the digits.

An MLP 256-128 with all gates at phi = 3/7, trained at one k from beginning to end under the same pressure on its
parameters. At k = 0 the gates are dropout's, at k = infinity there are none: both ends are compared with
plain PyTorch networks, with and without `nn.Dropout`, over more seeds.

About 12 minutes: python experiments/interpolation.py. Adds rows to results/interpolation.json, and goes on from there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import known, write, written
from torch import nn

import plasticnet as pn
from plasticnet.apps.data import Data, load_data
from plasticnet.apps.loop import train_epoch
from plasticnet.apps.models import MLP
from plasticnet.apps.preparing import Training
from plasticnet.apps.scores import evaluate
from plasticnet.apps.settings import Config
from plasticnet.gates.site import INITIAL_LOGIT, probabilities, transition

KS = (0.0, 0.1, 0.3, 1.0, 3.0, 7.0, 20.0, 60.0, 200.0, math.inf)
SEEDS, END_SEEDS = 3, 5
CONFIG = Config(batch=32, lr=3e-3, gate_lr=5e-2)
PRESSURE = pn.Pressure(0.05, "parameters", "log")
EPOCHS = 60


def with_dropout(mlp: MLP) -> nn.Module:
    """The network with dropout where plasticnet has gates: at the inputs of the layers behind hidden units."""
    layers: list[nn.Module] = []
    for i, layer in enumerate(mlp):
        layers += [nn.Dropout(0.5), layer] if isinstance(layer, nn.Linear) and i > 1 else [layer]
    return nn.Sequential(*layers)


def gated(k: float, data: Data, seed: int) -> dict[str, Any]:
    """One run at one k."""
    torch.manual_seed(seed)
    net = pn.PlasticNet(MLP([64, 256, 128, 10]), (data.train.x[:2],))
    net.k = k
    optimizer = torch.optim.Adam(net.param_groups(CONFIG.lr, CONFIG.gate_lr))
    # The schedule is never stepped, so that nothing is cut. Its k was set before, so that the gates stay as they are.
    pressure = PRESSURE
    schedule = pn.Schedule(net, optimizer, [pn.Stage(EPOCHS, k=k)], pressure=pressure)
    transitions = []
    for _ in range(EPOCHS):
        train_epoch(Training(net, optimizer, schedule), data.train, CONFIG)
        transitions.append(transition(probabilities(list(net.sites.values()), k).detach()))
    size = net.summary()
    return {
        "units": [s.open for s in size.sites],
        "parameters": size.open_parameters,
        "transition": transitions[-1],
        "transitions": transitions,
        "val_accuracy": evaluate(net, data.val)[1],
        "test_accuracy": evaluate(net.compact(), data.test)[1],
    }


def plain(dropout: bool, data: Data, seed: int) -> dict[str, Any]:
    """The same by hand, without plasticnet."""
    torch.manual_seed(seed)
    mlp = MLP([64, 256, 128, 10])
    model = with_dropout(mlp) if dropout else mlp
    optimizer = torch.optim.Adam(model.parameters(), CONFIG.lr)
    for _ in range(EPOCHS):
        model.train()
        for index in torch.randperm(len(data.train)).split(CONFIG.batch):
            loss = F.cross_entropy(model(data.train.x[index]), data.train.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    accuracies = {"val_accuracy": evaluate(model, data.val)[1], "test_accuracy": evaluate(model, data.test)[1]}
    return {"parameters": parameters, **accuracies}


def main() -> None:
    """Every k, and the two ends by hand."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    for seed in range(END_SEEDS):
        data = load_data("digits", seed=seed)
        for k in KS if seed < SEEDS else (0.0, math.inf):
            add("inf" if math.isinf(k) else k, seed, partial(gated, k, data, seed))
        for dropout in (True, False):
            add("dropout" if dropout else "plain", seed, partial(plain, dropout, data, seed))


def add(k: float | str, seed: int, run: Callable[[], dict[str, Any]]) -> None:
    """Run what is not there yet, and add its row."""
    if known("interpolation", k=k, seed=seed):
        return
    started = time.process_time()
    row = {"k": k, "seed": seed, **run(), "cpu_seconds": time.process_time() - started}
    print(k, seed, row["val_accuracy"], row["parameters"], flush=True)
    settings = {"epochs": EPOCHS, "penalty": PRESSURE.strength, "cost": PRESSURE.cost, "scale": PRESSURE.scale}
    settings |= {"batch": CONFIG.batch, "lr": CONFIG.lr, "gate_lr": CONFIG.gate_lr, "phi": INITIAL_LOGIT}
    write("interpolation", settings, [*written("interpolation"), row])


if __name__ == "__main__":
    main()
