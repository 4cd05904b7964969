"""A very small budget: a ResNet-20 with learned shortcuts, trained on the digits, to 5 % of its units.

That leaves 22 units for 12 sites. The layer before the classifier keeps four of them by default, because one or two
numbers cannot tell ten classes apart. "no floor" is what happens where it may keep fewer. "gates" is a schedule of ten
plastic epochs, "at once" is `pn.shrink`; both are trained for 40 epochs more. Test data are read at the end.

Two minutes a seed on one core: python experiments/few_units.py. Writes results/few_units.json.
"""

from __future__ import annotations

import copy
from typing import Any

import cifar
import torch
import torch.nn.functional as F
from common import known, write, written
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.data import load_data

NAME, SHARE, LAST = "few_units", 0.05, "layer3.0.conv2"
DENSE, PLASTIC, AFTER, BATCH, SEEDS = 15, 10, 40, 64, 3
Part = tuple[Tensor, Tensor]


class Block(cifar.Block):
    """A block whose shortcut is learned where the width changes."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__(into, out, stride)
        self.short = nn.Conv2d(into, out, 1, stride, bias=False) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, into, h, w) to (batch, out, h / stride, w / stride)."""
        return (self.short(x) + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class ResNet(cifar.ResNet):
    """A ResNet-20 with such shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        for i, (into, out) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [Block(out if j else into, out, 1 if j or i == 1 else 2) for j in range(3)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))


def part(data: Any) -> Part:
    """Images of three equal colours, and labels."""
    return data.x.view(-1, 1, 8, 8).expand(-1, 3, -1, -1).contiguous(), data.y


def train(model: nn.Module, epochs: int, rate: float, data: Part) -> None:
    """Train in the ordinary way, along one cycle of the learning rate."""
    x, y = data
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * -(-len(x) // BATCH), pct_start=0.1
    )
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
            cycle.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Part) -> float:
    """The share of right answers, in percent."""
    return 100 * float(model.eval()(data[0]).argmax(1).eq(data[1]).float().mean())


def limited(model: nn.Module, x: Tensor, floor: bool) -> pn.PlasticNet:
    """A network around a copy, with the usual minimum or without."""
    net = pn.PlasticNet(copy.deepcopy(model), (x[:2],))
    if not floor:
        net.limit("*", minimum=1)
    return net


def gates(net: pn.PlasticNet, data: Part) -> nn.Module:
    """Gates close under the budget."""
    x, y = data
    optimizer = torch.optim.AdamW(net.param_groups(1e-3, 4e-2))
    schedule = pn.Schedule(net, optimizer, [pn.Stage(PLASTIC, 7.0), pn.Stage(1)], budget=pn.Budget(units=SHARE))
    while schedule.epoch < schedule.epochs:
        net.train()
        for i in torch.randperm(len(x)).split(BATCH):
            loss = net.expected_loss(lambda i=i: F.cross_entropy(net(x[i]), y[i], reduction="none"))
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()
    return net.compact()


def at_once(net: pn.PlasticNet, data: Part) -> nn.Module:
    """The steps of `pn.shrink`, on a network whose limits may be set."""
    batches = data[0].split(BATCH)
    found = pn.scores(net, "repair", batches=batches)
    pn.prune_once(net, pn.Budget(units=SHARE), scores=found, per_cost=True, cut=False)
    pn.repair(net, batches)
    return net.compact()


def main() -> None:
    """Run what is not there yet."""
    torch.set_num_threads(1)
    data = load_data("digits")
    to_fit, test = part(data.train), part(data.test)
    for seed in range(SEEDS):
        todo = [(way, floor) for way in ("gates", "at once") for floor in (True, False)]
        todo = [t for t in todo if not known(NAME, seed=seed, way=t[0], floor=t[1])]
        if not todo:
            continue
        torch.manual_seed(seed)
        model = ResNet()
        train(model, DENSE, 3e-3, to_fit)
        for way, floor in todo:
            torch.manual_seed(seed)
            net = limited(model, to_fit[0], floor)
            units = sum(len(s) for s in net.sites.values())
            small = (gates if way == "gates" else at_once)(net, to_fit)
            before = accuracy(small, test)
            train(small, AFTER, 1e-2, to_fit)
            row = {"way": way, "floor": floor, "seed": seed, "dense": accuracy(model, test), "whole units": units}
            row |= {"units": {n: int(s.open.sum()) for n, s in net.sites.items()}, "before training": before}
            row |= {"accuracy": accuracy(small, test), "parameters": sum(p.numel() for p in small.parameters())}
            print(row, flush=True)
            settings = {"share": SHARE, "dense": DENSE, "plastic": PLASTIC, "after": AFTER, "batch": BATCH}
            write(NAME, settings, [*written(NAME), row])


if __name__ == "__main__":
    main()
