"""Do learned gates that start from scores beat a cut at once, at equal time? A trained LeNet-5 on Fashion-MNIST.

The network is trained on 20,000 images. Then it is cut to a share of its multiply-adds in three ways, each of which
imitates the network as it was (softened class probabilities, no labels), with Adam and a rate that falls along a
cosine:

- "at once": scores "repair", cut, repair, and then epochs of the cut network.
- "gates": plastic epochs from pi = 0.95 everywhere to the budget, repair as it hardens, an epoch at k = infinity.
- "gates from scores": the same, but a unit whose score for its cost is far above what the budget would keep at once
  starts at pi = 0.95, one far below at 0.05, and those near it between.

Plastic epochs cost more, so the first way gets more epochs. Processor seconds stand beside each row. Test images are
read at the end of a row and decide nothing.

    python experiments/gates_from_scores.py --data-dir DIR

takes about 15 minutes on one core. It adds rows to results/gates_from_scores.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import accuracy
from common import known, write, written
from repair import BATCH, CALIBRATE, fashion, trained
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.budgets.projection import prices

Losses = Callable[[Tensor, Tensor], Tensor]  # of outputs and what is wanted, shape (batch,)
NAME, K, TEMPERATURE = "gates_from_scores", 7.0, 4.0
DENSE = 6  # epochs with labels of the whole network
EPOCHS, PLASTIC, AFTER = 5, 2, 1  # of the cut network; and of the gates, plastic and at k = infinity
RATE, GATE_RATE = 1e-3, 2e-2
SPREAD = 1.0  # the logarithm of score over threshold at which a gate starts at sigmoid(3) = 0.95


def imitation(logits: Tensor, wanted: Tensor) -> Tensor:
    """The divergence of softened probabilities, shape (batch,)."""
    target = F.log_softmax(wanted / TEMPERATURE, 1)
    return F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), target, reduction="none", log_target=True).sum(1)


def train(
    model: nn.Module, wanted: Tensor, x: Tensor, steps: Callable[[Tensor, Tensor, float], None], epochs: int
) -> None:
    """Call ``steps`` with the images of each step, the outputs that are wanted, and the share of the rate."""
    count, done = epochs * math.ceil(len(x) / BATCH), 0
    for _ in range(epochs):
        model.train()
        for i in torch.randperm(len(x)).split(BATCH):
            steps(x[i], wanted[i], 0.5 * (1 + math.cos(math.pi * done / count)))
            done += 1


def at_once(net: pn.PlasticNet, worth: dict[str, Tensor], share: float, x: Tensor, wanted: Tensor) -> nn.Module:
    """Cut, repair, and train what is left."""
    pn.prune_once(net, pn.Budget(macs=share), scores=worth, per_cost=True, cut=False)
    pn.repair(net, x[:CALIBRATE].split(BATCH))
    small = net.compact()
    optimizer = torch.optim.Adam(small.parameters(), RATE)

    def step(inputs: Tensor, target: Tensor, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = RATE * rate
        optimizer.zero_grad()
        imitation(small(inputs), target).mean().backward()
        optimizer.step()

    train(small, wanted, x, step, EPOCHS)
    return small.eval()


def divided(net: pn.PlasticNet, worth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores divided by the multiply-adds that units cost."""
    price = prices(net, {"macs": net.summary().macs})
    return {name: found / torch.from_numpy(price[name]) for name, found in worth.items()}


def start(net: pn.PlasticNet, worth: dict[str, Tensor], share: float) -> None:
    """Start gates between 0.05 and 0.95, by how far a unit is from what a cut at once would keep."""
    once = copy.deepcopy(net)
    pn.prune_once(once, pn.Budget(macs=share), scores=worth, per_cost=True, cut=False)
    value = {n: found.clamp(min=1e-30).log() for n, found in divided(net, worth).items()}
    threshold = min(float(value[n][once.sites[n].open].min()) for n in net.sites)
    with torch.no_grad():
        for name, site in net.sites.items():
            logits = 3 * ((value[name] - threshold) / SPREAD).clamp(-1, 1)
            site.phi.copy_(logits / K)


def gates(
    net: pn.PlasticNet, share: float, x: Tensor, wanted: Tensor, losses: Losses = imitation, repair: bool = True
) -> nn.Module:
    """Learn which units stay, and train what is left; with or without repair as the network hardens."""
    optimizer = torch.optim.Adam(net.param_groups(lr=RATE, gate_lr=GATE_RATE))
    rates = [group["lr"] for group in optimizer.param_groups]
    stages = [pn.Stage(PLASTIC, K), pn.Stage(AFTER)]
    calibrate = x[:CALIBRATE].split(BATCH) if repair else None
    schedule = pn.Schedule(net, optimizer, stages, budget=pn.Budget(macs=share), repair=calibrate)
    done = 0

    def step(inputs: Tensor, target: Tensor, rate: float) -> None:
        nonlocal done
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * rate
        optimizer.zero_grad()
        (net.expected_loss(lambda: losses(net(inputs), target)) + schedule.penalty()).backward()
        optimizer.step()
        done += 1
        if done % math.ceil(len(x) / BATCH) == 0:
            schedule.step()

    train(net, wanted, x, step, PLASTIC + AFTER)
    return net.compact().eval()


def row(model: nn.Module, way: str, share: float, x: Tensor, test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Make a copy smaller in one way, and measure it."""
    begun = time.process_time()
    with torch.no_grad():
        wanted = torch.cat([model(b) for b in x.split(500)])
    net = pn.PlasticNet(copy.deepcopy(model), (x[:2],))
    worth = {} if way == "gates" else pn.scores(net, "repair", batches=x[:CALIBRATE].split(BATCH))
    if way == "gates from scores":
        start(net, worth, share)
    small = at_once(net, worth, share, x, wanted) if way == "at once" else gates(net, share, x, wanted)
    seconds = time.process_time() - begun
    summary = pn.PlasticNet(copy.deepcopy(small), (x[:2],)).summary()
    return {"accuracy": accuracy(small, *test), "seconds": seconds, "macs": summary.open_macs}


def main() -> None:
    """Measure all ways, shares and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = (t[:20_000] for t in fashion(options.data_dir, train=True))
    test = fashion(options.data_dir, train=False)
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = trained(x, y, DENSE)
        for share in options.shares:
            for way in ("at once", "gates", "gates from scores"):
                key = {"way": way, "share": share, "seed": seed}
                if known(NAME, **key):
                    continue
                torch.manual_seed(seed)
                found = {**key, "dense": accuracy(model, *test), **row(model, way, share, x, test)}
                print(found, flush=True)
                epochs = {"at once": EPOCHS, "plastic": PLASTIC, "after": AFTER}
                settings = {"epochs": epochs, "k": K, "rate": RATE, "gate rate": GATE_RATE, "calibrate": CALIBRATE}
                write(NAME, settings, [*written(NAME), found])


if __name__ == "__main__":
    main()
