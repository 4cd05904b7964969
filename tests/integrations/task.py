"""A task of a second for all integrations, and the plain loop that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import plasticnet as pn

WIDE = (8, 48, 32, 4)
SHARE = 0.3  # of the parameters may stay


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of four classes: clouds around two centres each."""
    centres = 1.5 * torch.randn(8, WIDE[0], generator=torch.Generator().manual_seed(7))
    random = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (n,), generator=random)
    return centres[which] + 0.6 * torch.randn(n, WIDE[0], generator=random), which % 4


def dataset(n: int = 320, seed: int = 1) -> TensorDataset:
    return TensorDataset(*points(n, seed))


def loader(batch: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(dataset(), batch, shuffle=True)


def fixed_loader(batch: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    """Batches that are the same in every epoch, and draw none of the random numbers that gates are drawn from."""
    return DataLoader(dataset(), batch, generator=torch.Generator())


def validation_loader(batch: int = 256) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(dataset(256, 2), batch, generator=torch.Generator())


def network() -> pn.PlasticNet:
    layers: list[nn.Module] = []
    for a, b in pairwise(WIDE):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return pn.PlasticNet(nn.Sequential(*layers[:-1]), (torch.zeros(2, WIDE[0]),))


def stages() -> list[pn.Stage]:
    return [pn.Stage(1), pn.Stage(6, k=7.0), pn.Stage(3)]


def budget() -> pn.Budget:
    return pn.Budget(params=SHARE)


def parameters(net: pn.PlasticNet) -> int:
    return sum(p.numel() for p in net.model.parameters())


def most() -> float:
    """How many parameters the budget leaves, at most."""
    return SHARE * sum(a * b + b for a, b in pairwise(WIDE))


def accuracy(net: pn.PlasticNet) -> float:
    """Percent of other points that the network gets right."""
    x, y = points(2000, 3)
    mode = net.training
    with torch.no_grad():
        right = (net.eval()(x).argmax(1) == y).float().mean()
    net.train(mode)
    return 100 * float(right)


def assert_pruned(net: pn.PlasticNet) -> None:
    """The network has hardened within the budget, and is not far below it."""
    assert math.isinf(net.k)
    assert 0.8 * most() <= parameters(net) <= most()


def assert_same_state(net: pn.PlasticNet, other: pn.PlasticNet) -> None:
    """Two networks are equal to the bit."""
    a, b = net.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert torch.equal(a[name], b[name]), name


def plain_loop(
    make: Callable[[pn.PlasticNet], torch.optim.Optimizer],
    batches: Sequence[Sequence[tuple[Tensor, Tensor]]],
    accumulate: int = 1,
    clip: float = 0.0,
) -> pn.PlasticNet:
    """Train a network of one's own on the given batches of each epoch."""
    net = network()
    optimizer = make(net)
    schedule = pn.Schedule(net, optimizer, stages(), budget=budget())
    for epoch in batches:
        net.train()
        for i, (x, y) in enumerate(epoch):
            loss = net.expected_loss(lambda x=x, y=y: F.cross_entropy(net(x), y, reduction="none"))
            ((loss + schedule.penalty()) / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(epoch):
                if clip:
                    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    return net
