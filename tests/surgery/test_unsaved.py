"""Buffers that are left out of state dicts come back with the units that own entries of them, or loading is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet
from tests.kit.networks import assert_same

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Scaled(nn.Module):
    """A vector that multiplies hidden features."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.arange(6.0) + 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh() * self.scale)


class Fixed(nn.Module):
    """A random matrix that reads hidden features, and another one that makes some."""

    down: Tensor
    up: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("down", torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), persistent=False)
        self.register_buffer("up", torch.randn(4, generator=torch.Generator().manual_seed(1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b((self.a(x) * 1.0) @ self.down.T).tanh() * self.up)


class Pair(nn.Module):
    """Two modules that hold one buffer, in images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 1), nn.Linear(24, 2)
        offset = torch.arange(6.0)[:, None]
        self.a.register_buffer("offset", offset, persistent=False)
        self.b.register_buffer("offset", offset, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.view(-1, 2, 4)) + self.a.get_buffer("offset")
        x = x + (self.b(x) * self.b.get_buffer("offset")).tanh()
        return self.head(x.flatten(1))


class Ones(Scaled):
    """All entries are equal, so that it does not matter which are left."""

    def __init__(self) -> None:
        super().__init__()
        self.scale.fill_(2.0)


MODELS: list[Callable[[], nn.Module]] = [Scaled, Fixed, Pair, Ones]


def build(make: Callable[[], nn.Module], seed: int = 0) -> PlasticNet:
    torch.manual_seed(seed)
    return PlasticNet(make(), (X,)).eval()


def resized(make: Callable[[], nn.Module], grow: bool = False) -> PlasticNet:
    """A network that has lost the first and the third unit of every site."""
    net = build(make)
    net.resize({n: [1, *range(3, len(s)), *[-1] * (2 * grow)] for n, s in net.sites.items()}, init="random")
    return net


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_is_exact(make: Callable[[], nn.Module], grow: bool, assign: bool) -> None:
    net, fresh = resized(make, grow), build(make, seed=1)
    assert net.sites
    fresh.load_state_dict(copy.deepcopy(net.state_dict()), assign=assign)
    assert torch.equal(fresh(X), net(X))
    assert torch.equal(fresh.compact()(X), net.compact()(X))
    assert fresh.state_dict().keys() == net.state_dict().keys()
    assert_same(fresh.state_dict(), net.state_dict())
    first = next(iter(fresh.sites))
    for other in (net, fresh):
        other.resize({first: [0, 2]})
    assert torch.equal(fresh(X), net(X))


@pytest.mark.parametrize("make", MODELS)
def test_a_network_that_has_lost_other_units(make: Callable[[], nn.Module]) -> None:
    net, other = resized(make), build(make, seed=1)
    other.resize({n: range(len(s) - 2) for n, s in other.sites.items()})  # as many, but others
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(X), net(X))
    whole = build(make)
    other.load_state_dict(whole.state_dict())  # all units come back
    assert torch.equal(other(X), whole(X))


@pytest.mark.parametrize("make", MODELS)
def test_through_a_file_and_a_module_around_it(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    around, fresh = nn.ModuleDict({"net": resized(make)}), nn.ModuleDict({"net": build(make, seed=1)})
    pn.save_checkpoint(around.state_dict(), tmp_path / "state")
    fresh.load_state_dict(pn.load_checkpoint(tmp_path / "state"))
    assert torch.equal(fresh["net"](X), around["net"](X))


def without(state: dict[str, Any]) -> dict[str, Any]:
    """A state as earlier versions wrote it."""
    return {n: t for n, t in state.items() if not n.startswith("buffer/")}


@pytest.mark.parametrize("make", [Scaled, Fixed, Pair])
def test_a_state_without_the_buffers_is_refused_where_it_would_be_wrong(make: Callable[[], nn.Module]) -> None:
    for net, fresh in ((resized(make), build(make)), (build(make), resized(make)), (resized(make), resized(make))):
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(PlasticError, match="the state lacks the buffer"):
            fresh.load_state_dict(without(net.state_dict()))
        assert_same(fresh.state_dict(), before)


def test_a_state_without_the_buffers_loads_where_it_is_right() -> None:
    for net, fresh in ((build(Scaled), build(Scaled, 1)), (resized(Ones), build(Ones, 1))):
        fresh.load_state_dict(without(net.state_dict()))
        assert torch.equal(fresh(X), net(X))


@pytest.mark.parametrize("value", [torch.ones(7), torch.ones(4, dtype=torch.int64), None, torch.ones(2, 2)])
def test_a_damaged_buffer_is_refused(value: Any) -> None:
    net = resized(Scaled)
    fresh, before = build(Scaled), copy.deepcopy(net.state_dict())
    with pytest.raises(PlasticError, match="scale"):
        fresh.load_state_dict({**before, "buffer/scale": value})
    assert len(fresh.sites["a"]) == 6


def test_a_buffer_that_modules_share_stays_shared_in_another_precision() -> None:
    net = build(Pair).double()
    net.resize({n: [1, 3] for n in net.sites})
    x = X.double()
    assert torch.equal(net.compact()(x), net(x))
    assert net.model.a.offset is net.model.b.offset


def test_other_state_dicts_hold_nothing_more() -> None:
    class Saved(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", self.scale, persistent=True)

    class Apart(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh()) * self.scale.sum()

    for make in (Saved, Apart):
        assert not [n for n in build(make).state_dict() if n.startswith("buffer/")]
    assert "scale" not in build(Scaled).compact().state_dict()
