"""Models that TorchScript has compiled, in part or as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) + 1e-5


def compiled(module: nn.Module, way: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls both ways deprecated
        return torch.jit.script(module) if way == "script" else torch.jit.trace(module.eval(), torch.randn(4, 16))


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.part(self.first(x))).relu())


def close_half(net: pn.PlasticNet) -> None:
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[torch.randperm(len(site))[: len(site) // 2]] = -1


@pytest.mark.parametrize("way", ["script", "trace"])
@pytest.mark.parametrize(("make", "sites"), [(Shift, ["first", "second"]), (Middle, ["second"])])
def test_a_part_that_is_compiled(way: str, make: Callable[[], nn.Module], sites: list[str]) -> None:
    x = torch.randn(6, 8)
    with warnings.catch_warnings():
        part = compiled(make(), way)
        warnings.simplefilter("error")
        net = pn.PlasticNet(Net(part), (x,))
        assert list(net.sites) == sites
        if make is Middle:
            assert net.frozen["first"] == "compiled by TorchScript, which cannot be cut"
            assert "TorchScript" in net.frozen["part.linear"]
        optimizer = torch.optim.Adam(net.param_groups(lr=0.01))
        net.k = 7.0
        for _ in range(3):
            optimizer.zero_grad()
            net.expected_loss(lambda: net(x).square().mean(1)).backward()
            optimizer.step()
        net.k = float("inf")
        close_half(net)
        small = net.eval().compact()
        assert (net(x) - small(x)).abs().max() <= 1e-6
        net.prune(optimizer=optimizer)
        assert (net(x) - small(x)).abs().max() <= 1e-6
        assert pn.profile(net, (x,)).parameters == sum(p.numel() for p in net.model.parameters())


@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_whole_model_is_refused_with_the_way_out(way: str) -> None:
    model = compiled(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), way)
    with pytest.raises(pn.PlasticError, match=r"compiled by TorchScript.*before torch\.jit\.script"):
        pn.PlasticNet(model, (torch.randn(2, 16),))


def test_blocks_and_single_weights_of_a_compiled_part() -> None:
    model, x = Net(compiled(Middle(), "script")), torch.randn(6, 8)
    net = pn.PlasticNet(model, (x,), blocks=["part"], weights=["*"])
    assert "TorchScript" in net.frozen["part (as a block)"]
    assert "TorchScript" in net.frozen["part.linear.weight"]
    assert "part.linear.weight" not in net.weights
