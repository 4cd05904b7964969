"""Small networks of many kinds, and a step of training."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from plasticnet import PlasticNet


class ConvNet(nn.Module):
    """Convolutions, BatchNorm, a residual sum, a concatenation, flatten, dropout."""

    def __init__(self, norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 4, 1)
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(10 * 4, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        y = x + self.conv2(x).relu()
        y = torch.cat([y, self.conv3(x)], 1)
        y = nn.functional.max_pool2d(y, 2).flatten(1)
        return self.fc2(self.drop(self.fc1(y).relu()))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 4, 4)


def randomise_gates(net: object, closed: float = 0.4) -> None:
    """Random logits, some closed, at least one open per site."""
    with torch.no_grad():
        for site in net.sites.values():  # pyright: ignore[reportAttributeAccessIssue]
            site.phi.copy_(torch.rand_like(site.phi) - closed)
            site.phi[int(torch.randint(len(site), ()))] = 0.3


def small(**options: Any) -> tuple[PlasticNet, Optimizer]:
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),), **options)
    return net, Adam(net.param_groups(1e-2))


def train_step(net: PlasticNet, optimizer: Optimizer, x: Tensor | None = None, strength: float = 1e-3) -> None:
    x = torch.randn(6, 4) if x is None else x
    y = torch.arange(len(x)) % 3
    net.train()
    loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
    optimizer.zero_grad()
    (loss + net.penalty(strength)).backward()
    optimizer.step()


def set_probabilities(net: PlasticNet, site: str, *pi: float) -> None:
    with torch.no_grad():
        net.sites[site].phi.copy_(torch.tensor(pi).logit() / net.k)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b or (a != a and b != b), where


def tiny(units: int = 3) -> nn.Module:
    class Residual(nn.Module):
        """A square layer whose input and output are one site: the variance matters."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, units), nn.Linear(units, units), nn.Linear(units, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            return self.c(h + self.b(h).tanh())

    return Residual()
