"""A network is brought to another precision: its model follows, and its gates stay in at least single precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.networks import assert_same

DOUBLE, SINGLE = torch.float64, torch.float32
HALVES = [torch.bfloat16, torch.float16]


class Stream(nn.Module):
    """A residual stream with norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer(self.norms[0](x)).relu()
        return self.out(self.norms[1](x))


def chain() -> nn.Module:
    layers = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)
    return nn.Sequential(*layers)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "per sample": (chain, {"gates": "sample"}),
    "per batch": (chain, {"gates": "batch"}),
    "inputs": (chain, {"inputs": "3"}),
    "weights": (chain, {"weights": "*"}),
    "norms": (Stream, {"residual": True}),
    "blocks": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3)),
               {"blocks": "1"}),
}  # fmt: skip


def build(name: str) -> tuple[pn.PlasticNet, Tensor]:
    torch.manual_seed(0)
    make, options = NETWORKS[name]
    x = torch.randn(16, 6)
    return pn.PlasticNet(make(), (x[:2],), **options), x


def assert_kept(net: pn.PlasticNet, wanted: torch.dtype) -> None:
    """The parameters of the model have this precision, and gates at least single precision."""
    assert {p.dtype for p in net.model.parameters()} == {wanted}
    assert {g.phi.dtype for g in net.all_gates()} == {DOUBLE if wanted == DOUBLE else SINGLE}
    assert all(s.grace.dtype == torch.int64 for s in net.sites.values())


def step(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, schedule: pn.Schedule, x: Tensor) -> None:
    net.train()
    loss = net.expected_loss(lambda: net(x).float().square().sum(1)) + schedule.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [pn.Budget(macs=0.6), pn.Budget(loss=0.1)], ids=["macs", "loss"])
@pytest.mark.parametrize("wanted", [*HALVES, DOUBLE])
@pytest.mark.parametrize("name", NETWORKS)
def test_everything_works_afterwards(name: str, wanted: torch.dtype, budget: pn.Budget, tmp_path: Path) -> None:
    net, x = build(name)
    assert net.to(wanted) is net
    assert_kept(net, wanted)
    x = x.to(wanted)
    optimizer = torch.optim.Adam(net.param_groups(1e-3), eps=1e-4)
    schedule = pn.Schedule(net, optimizer, [pn.Stage(1), pn.Stage(4, k=7.0), pn.Stage(1)], budget=budget, hibernate=0.3)
    for _ in range(schedule.epochs):
        step(net, optimizer, schedule, x)
    assert_kept(net, wanted)
    small, y = net.compact(), net.eval()(x)
    assert {p.dtype for p in small.parameters()} == {wanted}
    tolerance = 1e-9 if wanted == DOUBLE else 5e-2
    torch.testing.assert_close(small(x), y, rtol=tolerance, atol=tolerance)
    pn.save(small, tmp_path / "small")
    fresh, _ = build(name)
    fresh.to(wanted).load_state_dict(net.state_dict())
    assert_same(fresh.state_dict(), net.state_dict())
    assert torch.equal(fresh.eval()(x), y)
    assert net.summary().parameters == sum(p.numel() for p in net.model.parameters())
    net.prune(0.9, optimizer)


@pytest.mark.parametrize("name", NETWORKS)
def test_back_and_forth_in_the_middle_of_a_schedule(name: str) -> None:
    net, x = build(name)
    optimizer = torch.optim.SGD(net.param_groups(1e-2), momentum=0.9)
    schedule = pn.Schedule(net, optimizer, [pn.Stage(6, k=7.0), pn.Stage(1)], budget=pn.Budget(macs=0.6))
    for epoch, wanted in enumerate([SINGLE, DOUBLE, DOUBLE, SINGLE, SINGLE, DOUBLE, SINGLE]):
        if epoch and wanted != next(net.model.parameters()).dtype:
            net.to(wanted)
            optimizer.state.clear()
        assert_kept(net, wanted)
        step(net, optimizer, schedule, x.to(wanted))
    torch.testing.assert_close(net.compact()(x), net.eval()(x))


@pytest.mark.parametrize("convert", [
    lambda net: net.half(), lambda net: net.bfloat16(), lambda net: net.type(torch.float16),
    lambda net: net.to(device="cpu", dtype=torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("name", ["norms", "inputs", "weights"])
def test_logits_keep_their_values(name: str, convert: Callable[[pn.PlasticNet], pn.PlasticNet]) -> None:
    net, _ = build(name)
    with torch.no_grad():
        for g in net.all_gates():
            g.phi.copy_(torch.randn_like(g.phi))
            g.phi.grad = torch.randn_like(g.phi)
    before = copy.deepcopy(net.gates.state_dict())
    gradients = [g.phi.grad for g in net.all_gates()]
    convert(net)
    assert_same(net.gates.state_dict(), before)
    assert_same([g.phi.grad for g in net.all_gates()], gradients)
    net.prune(0.5)
    net.double().float()
    assert_kept(net, SINGLE)
