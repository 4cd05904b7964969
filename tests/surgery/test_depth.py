"""Blocks that sleep: they are not run, cost nothing and stay closed; and when they wake, they are the identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from plasticnet import PlasticError, PlasticNet, narrow
from tests.kit.blocks import After, Before, InOrder, Reader, Stages
from tests.kit.networks import assert_same

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "MLP": (InOrder, (6, 4), "layers.?"),
    "after": (lambda: Stages(After), (6, 1, 8, 8), "stages.*.[0-2]"),
    "before": (lambda: Stages(Before), (6, 1, 8, 8), "stages.*.[0-2]"),
    "transformer": (Reader, (6, 5, 3), "layers.?"),
}


def shallow(kind: str, start: int = 2) -> tuple[PlasticNet, Tensor]:
    """Return a network in double precision with one block awake at each site, and inputs."""
    torch.manual_seed(0)
    make, shape, blocks = MODELS[kind]
    x = torch.randn(shape, dtype=torch.float64)
    net = PlasticNet(make().double(), (x,), blocks=[blocks])
    narrow(net, start, blocks=1)
    return net, x


def depths(net: PlasticNet) -> list[str]:
    return [n for n in net.sites if n.endswith("depth")]


def widths(net: PlasticNet) -> dict[str, int]:
    return {n: len(s) for n, s in net.sites.items()}


def train(net: PlasticNet, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> None:
    net.train()
    for _ in range(steps):
        loss = net.expected_loss(lambda: net(x).square().flatten(1).mean(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run(net: PlasticNet, x: Tensor) -> Tensor:
    torch.manual_seed(7)  # for dropout
    return net(x)


@pytest.mark.parametrize("kind", MODELS)
def test_a_block_wakes_as_the_identity_to_the_bit(kind: str) -> None:
    """In evaluation and in training, and after the widths of the blocks beside it, and of the stream, have changed."""
    net, x = shallow(kind)
    optimizer = Adam(net.param_groups(1e-2))
    train(net, optimizer, x)
    net.grow({n: 1 for n, s in net.sites.items() if s.units.growable and s.awake}, optimizer)
    train(net, optimizer, x)
    before = x
    for mode in (False, True):
        net.train(mode)
        before = run(net, x)
        net.grow(dict.fromkeys(depths(net), 1), optimizer)
        assert torch.equal(run(net, x), before)
    inner = {n.rpartition(".")[2]: len(s) for n, s in net.sites.items() if ".0." in n and ".1." not in n}
    for name, site in net.sites.items():
        assert site.awake == len(site)
        assert len(site) == inner.get(name.rpartition(".")[2], len(site))
    train(net, optimizer, x)
    assert not torch.equal(run(net, x), before)
    block = net.model.get_submodule("layers.1" if hasattr(net.model, "layers") else "stages.0.1")
    assert isinstance(block, nn.Module)
    assert all(p.any() for n, p in block.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("kind", MODELS)
def test_compact_equals_gated_with_some_blocks_awake(kind: str) -> None:
    net, x = shallow(kind)
    optimizer = Adam(net.param_groups(1e-2))
    train(net, optimizer, x)
    net.grow({depths(net)[0]: 1}, optimizer)
    train(net, optimizer, x)
    small = net.eval().compact()
    assert (small(x) - net(x)).abs().max() < 1e-9
    assert sum(p.numel() for p in small.parameters()) == net.summary().open_parameters


@pytest.mark.parametrize("estimator", ["bitflip-cv", "arm", "disarm", "arms"])
@pytest.mark.parametrize("k", [0.0, 0.5, 7.0, math.inf])
def test_what_sleeps_is_never_run_at_any_k(k: float, estimator: str) -> None:
    net, x = shallow("MLP")
    net.sampler.estimator = estimator
    net.k = k
    called: list[str] = []
    for block in ("layers.1", "layers.2"):
        net.model.get_submodule(f"{block}.up").register_forward_hook(lambda *_, b=block: called.append(b))
    optimizer = Adam(net.param_groups(1e-2, 1.0))
    before = {n: s.phi.detach().clone() for n, s in net.sites.items() if bool(s.asleep.any())}
    train(net, optimizer, x, 5)
    net.eval()(x)
    assert called == []
    for name, phi in before.items():
        asleep = net.sites[name].asleep
        assert torch.equal(net.sites[name].phi.detach()[asleep], phi[asleep])


def test_what_sleeps_costs_nothing() -> None:
    net, _ = shallow("after")
    blocks = {n: p.numel() for n, p in net.model.named_parameters() if n.startswith("stages.")}
    asleep = sum(n for name, n in blocks.items() if name.split(".")[2] != "0")
    all_of_it = sum(p.numel() for p in net.model.parameters())
    assert net.summary().open_parameters == all_of_it - asleep
    assert float(net.cost.full("parameters")) == all_of_it - asleep
    net.k = 7.0
    assert net.penalty(1.0, "parameters").item() < all_of_it - asleep
    prices = dict(zip(net.sites, net.cost.unit_costs("parameters"), strict=True))
    first = sum(n for name, n in blocks.items() if name.startswith("stages.0.0."))
    assert prices["stages.0.depth"] == first
    assert prices["stages.0.1.conv1"] == 0
    assert prices["stages.0.0.conv1"] > 0


def test_a_woken_block_has_no_past_in_the_optimizer() -> None:
    """Its parameters, and the logits within it, have the state of new parameters; all others keep theirs."""
    net, x = shallow("MLP")
    optimizer = Adam(net.param_groups(1e-2, weight_decay=0.1))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    down = net.model.get_parameter("layers.1.down.weight")
    net.grow({"layers.depth": 1}, optimizer)
    assert net.model.get_parameter("layers.1.down.weight") is down
    asleep = {id(p) for p in net.model.get_submodule("layers.1").parameters()}
    assert not any(id(p) in asleep for p in optimizer.state)
    assert all(p.grad is None for p in net.model.get_submodule("layers.1").parameters())
    assert all(bool(optimizer.state[p]["exp_avg"].any()) for p in net.model.get_submodule("layers.0").parameters())
    moments = optimizer.state[net.sites["layers.depth"].phi]["exp_avg"]
    assert moments[1] == 0
    assert moments[0] != 0
    assert net.sites["layers.1.up"].phi not in optimizer.state
    train(net, optimizer, x)


def test_a_state_dict_says_what_sleeps() -> None:
    net, x = shallow("after")
    net.grow({"stages.1.depth": 1})
    state = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(0)
    other = PlasticNet(Stages(After).double(), (x,), blocks=["stages.*.[0-2]"])
    other.load_state_dict(state)
    assert_same(other.state_dict(), state)
    assert [s.grace.tolist() for s in other.sites.values()] == [s.grace.tolist() for s in net.sites.values()]
    assert float(other.cost.full("macs")) == float(net.cost.full("macs"))
    assert torch.equal(other.eval()(x), net.eval()(x))
    other.grow({"stages.0.depth": 2, "stages.1.depth": 1})
    assert torch.equal(other(x), net(x))
    assert float(other.cost.full("macs")) == other.summary().macs


def test_more_than_sleep_cannot_wake() -> None:
    net, _ = shallow("MLP")
    optimizer = SGD(net.param_groups(1e-2), lr=1e-2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    wrong: list[tuple[Any, str]] = [
        ({"layers.depth": 3}, "3 blocks were to open, but 2 sleep"),
        ({"stem": 1, "layers.depth": 3}, "2 sleep"),
        ({"layers.depth": -1}, "whole numbers"),
    ]
    for counts, message in wrong:
        with pytest.raises(PlasticError, match=message):
            net.grow(counts, optimizer)
        assert_same(net.state_dict(), before)
    with pytest.raises(PlasticError, match="gradmax"):
        net.grow({"layers.depth": 1}, optimizer, init="gradmax", loss=lambda: net(torch.randn(2, 4)).sum(1))
    with pytest.raises(PlasticError, match="do not hold"):
        net.grow({"layers.depth": 1}, SGD([net.model.get_parameter("stem.weight")], lr=1e-2))
    assert_same(net.state_dict(), before)


def test_what_sleeps_is_not_cut() -> None:
    net, _ = shallow("MLP", 4)
    net.k = 7.0
    with torch.no_grad():
        net.sites["layers.0.up"].phi[:2] = -3.0
    assert net.prune(0.5) == {"layers.0.up": 2}
    assert widths(net) == {"stem": 4, "layers.0.up": 2, "layers.1.up": 4, "layers.2.up": 4, "layers.depth": 3}
    net.grow({"layers.depth": 1})
    assert widths(net)["layers.1.up"] == 2
