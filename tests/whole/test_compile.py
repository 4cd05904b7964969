"""torch.compile: the same results, for gates per sample, per batch and none, and after a change of size."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import PlasticNet
from tests.kit.networks import mlp

INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler, g++")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*"),  # the compiler's own, many and changing
]


class Normed(nn.Module):
    """A residual stream behind a norm: its statistics are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.body, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.body(self.norm(x)).tanh())


def results(net: PlasticNet, compiled: str | None) -> list[Tensor]:
    """Losses and gradients of a few steps, at infinite and finite k by turns and at another size."""
    torch.compiler.reset()
    if compiled:
        net.compile(backend=compiled)
    x, y = torch.linspace(-1, 1, 72).reshape(12, 6), torch.arange(12) % 3
    found = []
    for k in (math.inf, 2.0, math.inf, 2.0, "resize", 2.0):
        if k == "resize":
            name = next(iter(net.sites))
            net.resize({name: list(range(1, len(net.sites[name])))})
            continue
        net.k = k
        torch.manual_seed(3)
        net.train()
        net.zero_grad()
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        loss.backward()
        found += [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None), net.eval()(x).detach()]
    return found


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
@pytest.mark.parametrize("gates", ["sample", "batch"])
def test_compiled_equals_written(gates: Any, backend: str) -> None:
    for model, residual in ((mlp(6, 16, 8, 3), False), (Normed(), True)):
        state = {n: t.clone() for n, t in model.state_dict().items()}
        net = PlasticNet(model, (torch.randn(2, 6),), gates=gates, residual=residual)
        expected = results(net, None)
        model = mlp(6, 16, 8, 3) if not residual else Normed()
        model.load_state_dict(state)
        found = results(PlasticNet(model, (torch.randn(2, 6),), gates=gates, residual=residual), backend)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_whole_network_compiled() -> None:
    torch.compiler.reset()
    net = PlasticNet(mlp(6, 16, 3), (torch.randn(2, 6),))
    net.k = 2.0
    net.train()
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    found = []
    for call in (net, torch.compile(net, backend="eager")):
        torch.manual_seed(3)
        net.zero_grad()
        net.expected_loss(lambda call=call: F.cross_entropy(call(x), y, reduction="none")).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
