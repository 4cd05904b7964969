"""From a trained network to a small one: in one shot or under a budget while it trains on, with and without a teacher.

Run it with ``python examples/from_trained.py``; it takes about a minute on one core.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from own_model import Net
from sklearn.datasets import load_digits
from torch import Tensor

import plasticnet as pn

Loss = Callable[[pn.PlasticNet, Tensor], Tensor]  # of some of the training images, by their indices

torch.manual_seed(0)
images, classes = load_digits(return_X_y=True)
order = torch.randperm(len(classes))
x, x_test = (torch.tensor(images).float().reshape(-1, 1, 8, 8) / 8 - 1)[order].split([1437, 360])
y, y_test = torch.tensor(classes)[order].split([1437, 360])


def cross_entropy(net: pn.PlasticNet, i: Tensor) -> Tensor:
    return F.cross_entropy(net(x[i]), y[i], reduction="none")


def train(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, schedule: pn.Schedule, losses: Loss) -> None:
    for _ in range(schedule.epochs):
        net.train()
        for i in torch.randperm(len(x)).split(32):
            loss = net.expected_loss(lambda i=i: losses(net, i)) + schedule.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def start(trained: torch.nn.Module) -> tuple[pn.PlasticNet, torch.optim.Optimizer]:
    net = pn.PlasticNet(copy.deepcopy(trained), (x[:2],))
    return net, torch.optim.Adam(net.param_groups(lr=2e-3, gate_lr=0.05))


@torch.no_grad()
def accuracy(net: pn.PlasticNet) -> float:
    return (net.eval()(x_test).argmax(1) == y_test).float().mean().item()


def all_losses(net: pn.PlasticNet) -> Tensor:
    return cross_entropy(net, torch.arange(len(x)))


def main() -> None:
    net, optimizer = start(Net())
    train(net, optimizer, pn.Schedule(net, optimizer, [pn.Stage(15)]), cross_entropy)
    dense = net.compact()
    with torch.no_grad():
        taught = dense(x)
    print(pn.sensitivity(net, lambda net: all_losses(net).mean().item()))  # better: on validation data
    print(f"\n{'':6} {'':32} {'at once':>8} {'trained':>8} {'MACs':>7}  units")

    def show(share: float, name: str, net: pn.PlasticNet, at_once: float = math.nan) -> None:
        units = "-".join(str(len(s)) for s in net.sites.values())
        before = "" if math.isnan(at_once) else f"{at_once:.2%}"
        print(f"{share:6.0%} {name:32} {before:>8} {accuracy(net):8.2%} {net.summary().macs:7,}  {units}")

    def distilled(net: pn.PlasticNet, i: Tensor) -> Tensor:
        return pn.distillation(net(x[i]), taught[i], y[i])

    show(1.0, "dense", net)
    for share in (0.3, 0.1):
        budget = pn.Budget(macs=share)
        ways = [("magnitude", cross_entropy), ("taylor", cross_entropy), ("gate", cross_entropy), ("gate", distilled)]
        for kind, losses in ways:
            net, optimizer = start(dense)
            pn.prune_once(net, budget, optimizer, scores=kind, loss=lambda net=net: all_losses(net))
            at_once = accuracy(net)
            train(net, optimizer, pn.Schedule(net, optimizer, [pn.Stage(10)]), losses)
            show(share, f"one shot, {kind}{', distilled' * (losses is distilled)}", net, at_once)
        for losses in (cross_entropy, distilled):
            net, optimizer = start(dense)
            stages = [pn.Stage(7, k=7.0), pn.Stage(3)]  # from all gates open
            train(net, optimizer, pn.Schedule(net, optimizer, stages, budget=budget), losses)
            show(share, f"gates under a budget{', distilled' * (losses is distilled)}", net)


if __name__ == "__main__":
    main()
