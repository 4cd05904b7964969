"""Optimizers: torch's follow a resize, all that cannot be sliced is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Adam, Optimizer

from plasticnet import PlasticError, PlasticNet, Schedule, Stage
from tests.kit.networks import ConvNet, assert_same, images, small, train_step

TORCH: dict[str, Callable[[Iterable], Optimizer]] = {
    "SGD": lambda groups: optim.SGD(groups, momentum=0.9, nesterov=True),
    "plain SGD": optim.SGD,
    "Adam": lambda groups: Adam(groups, amsgrad=True),
    "Adam, fused": lambda groups: Adam(groups, fused=True),
    "AdamW": optim.AdamW,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Adamax": optim.Adamax,
    "Adagrad": lambda groups: optim.Adagrad(groups, initial_accumulator_value=0.1),
    "Adadelta": optim.Adadelta,
    "RMSprop": lambda groups: optim.RMSprop(groups, centered=True, momentum=0.9),
    "ASGD": optim.ASGD,
    "Rprop": optim.Rprop,
}


@pytest.mark.parametrize("name", TORCH)
def test_those_of_torch_follow_a_resize(name: str) -> None:
    """A twin whose cut units were closed all along takes the same steps: slicing is exact."""
    net = PlasticNet(ConvNet(norm=False).double(), (images().double(),))
    net.k = float("inf")
    with torch.no_grad():
        net.sites["conv3"].phi[[0, 2]] = -1.0
    twin = copy.deepcopy(net)
    pairs = [(n, TORCH[name](n.param_groups(1e-2))) for n in (net, twin)]
    batches = [images(6).double() for _ in range(6)]
    for i, x in enumerate(batches):
        if i == 3:
            net.resize({"conv3": [1, 3]}, pairs[0][1])
        for n, optimizer in pairs:
            train_step(n, optimizer, x)
    for a, b in (
        (net.model.conv3.weight, twin.model.conv3.weight[[1, 3]]),
        (net.model.fc2.weight, twin.model.fc2.weight),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert set(pairs[0][1].state) <= set(net.parameters())
    # New units: state of the same keys, and steps of ordinary length.
    optimizer = pairs[0][1]
    net.grow({"conv3": 2}, optimizer, init="random")
    before = net.model.conv3.weight.detach().clone()
    train_step(net, optimizer, batches[0])
    moved = (net.model.conv3.weight.detach() - before).abs().amax((1, 2, 3))
    assert 0 < float(moved[2:].max()) < 20 * float(moved[:2].max())


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="came with torch 2.9")
def test_muon_for_the_matrices() -> None:
    net, _ = small()
    net.k = 7.0
    matrices = [p for p in net.model.parameters() if p.dim() == 2]
    others = [p for p in net.parameters() if p.dim() < 2]
    optimizers = [optim.Muon(matrices), Adam(others, lr=1e-2)]
    schedule = Schedule(net, optimizers, [Stage(2, 7.0)])
    x = torch.randn(6, 4)

    def step() -> None:
        net.zero_grad()
        net.expected_loss(lambda: net(x).pow(2).sum(1)).backward()
        for optimizer in optimizers:
            optimizer.step()

    step()
    kept = optimizers[0].state[net.model[0].weight]["momentum_buffer"][[0, 1, 3, 4, 5]].clone()
    with torch.no_grad():
        net.sites["0"].phi[2] = -3.0
    assert schedule.step().cut == {"0": 1}
    assert torch.equal(optimizers[0].state[net.model[0].weight]["momentum_buffer"], kept)
    step()


# -- refused ----------------------------------------------------------------------------------


def stand_in(module: str, name: str, *bases: type) -> type[Optimizer]:
    """A class that passes for one of another library."""
    return type(name, bases or (optim.SGD,), {"__module__": module})


FOREIGN = {
    "AdamW8bit": stand_in("bitsandbytes.optim.adamw", "AdamW8bit"),
    "Adam": stand_in("bitsandbytes.optim.adam", "Adam"),
    "AdamFp8": stand_in("torchao.optim.adam", "AdamFp8"),
    "MyAdam": stand_in("mine", "MyAdam", stand_in("torchao.optim.adam", "_AdamBase")),
    "AdamWScheduleFree": stand_in("schedulefree.adamw_schedulefree", "AdamWScheduleFree"),
    "DistributedShampoo": stand_in("distributed_shampoo.distributed_shampoo", "DistributedShampoo"),
    "Shampoo": stand_in("torch_optimizer.shampoo", "Shampoo"),
    "SOAP": stand_in("soap", "SOAP"),
    "SAM": stand_in("sam", "SAM"),
    "Lookahead": stand_in("timm.optim.lookahead", "Lookahead"),
    "ZeroRedundancyOptimizer": stand_in("torch.distributed.optim", "ZeroRedundancyOptimizer"),
    "Adafactor": stand_in("transformers.optimization", "Adafactor"),
    "SubclassedLBFGS": type("SubclassedLBFGS", (optim.LBFGS,), {}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_refused_by_name_before_they_hold_state(name: str) -> None:
    net, _ = small()
    options = {} if name == "SubclassedLBFGS" else {"lr": 0.1}
    optimizer = FOREIGN[name](list(net.parameters()), **options)
    _refused(net, optimizer, rf"{name} cannot follow a change of size: .*\. Use SGD, Adam")


@pytest.mark.parametrize("kind", [optim.LBFGS, optim.SparseAdam, optim.Adafactor])
def test_those_of_torch_that_are_refused(kind: Any) -> None:
    net, _ = small()
    _refused(net, kind(list(net.parameters())), f"{kind.__name__} cannot follow")


def _refused(net: PlasticNet, optimizer: Any, message: str) -> None:
    """At construction of a schedule and before a resize; nothing changes."""
    parameters, groups = list(net.parameters()), copy.deepcopy(optimizer.param_groups)
    state = copy.deepcopy(net.state_dict())
    for change in (
        lambda: Schedule(net, optimizer, [Stage(1, 7.0)]),
        lambda: net.resize({"0": [0, 1, -1]}, optimizer),
        lambda: net.grow({"0": 1}, [optimizer]),
    ):
        with pytest.raises(PlasticError, match=message):
            change()
    assert all(p is q for p, q in zip(parameters, net.parameters(), strict=True))
    assert_same(net.state_dict(), state)
    assert len(groups) == len(optimizer.param_groups)


class Transparent(Optimizer):
    """As Accelerate's: it hands on to the inner one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)  # pyright: ignore[reportAssignmentType]
    param_groups = property(lambda self: self.optimizer.param_groups)  # pyright: ignore[reportAssignmentType]


class Wrapper(Optimizer):
    """One with state of its own."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        super().__init__(optimizers[0].param_groups, {})
        self.chained = optimizers


def test_wrappers_are_refused_and_the_inner_one_is_named() -> None:
    net, optimizer = small()
    wrapper = Transparent(optimizer)
    _refused(net, wrapper, r"Transparent is a wrapper of Adam, .*pass that, \.optimizer\.")
    _refused(net, Wrapper([optimizer]), "Wrapper is a wrapper of Adam, .*it keeps groups or state of its own")
    net.resize({"0": [0, 1, -1]}, wrapper.optimizer)
    train_step(net, wrapper.optimizer)
    assert {id(p) for g in wrapper.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("thing", [3, "adam", {"a": 1}])
def test_what_is_no_optimizer(thing: Any) -> None:
    net, _ = small()
    with pytest.raises(PlasticError, match=r"is no torch\.optim\.Optimizer"):
        net.resize({"0": [0, 1]}, thing)
    with pytest.raises(PlasticError, match=r"is no torch\.optim\.Optimizer"):
        Schedule(net, thing, [Stage(1)])


# -- others, by their state -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(6, 4, dtype=torch.uint8), r"'own' of torch.uint8, quantised"),
        (torch.zeros(6, 4, dtype=torch.int32), r"'own' of torch.int32"),
        (torch.zeros(6, 4).to(torch.float8_e4m3fn), "'own' of torch.float8"),
        (torch.zeros(6), r"'own' of shape \(6,\)"),
        (torch.zeros(4, 6), r"'own' of shape \(4, 6\)"),
        ([torch.zeros(6, 6)], "'own' in a list"),
        ({"q": torch.zeros(6, 6)}, "'own' in a dict"),
        (nn.Linear(2, 2), "'own' in a Linear"),
        (torch.zeros(6, 4), None),
        (torch.zeros(6, 4, dtype=torch.bfloat16), None),
        (torch.zeros(6, 4, dtype=torch.bool), None),
        (torch.tensor(3), None),
        (torch.zeros(1), None),
        (3, None),
        (None, None),
        ([], None),
        ({"beta": 0.9}, None),
    ],
)
def test_state_of_third_parties(value: Any, message: str | None) -> None:
    net, optimizer = small()
    train_step(net, optimizer)
    optimizer.state[net.model[0].weight]["own"] = value
    if message:
        _refused(net, optimizer, f"Adam keeps state {message}.* for .*0.weight of shape")
    else:
        net.resize({"0": [0, 2, -1]}, optimizer)
        own = optimizer.state[net.model[0].weight]["own"]
        if isinstance(value, torch.Tensor) and value.shape == (6, 4):
            assert own.shape == (3, 4)
            assert own.dtype == value.dtype
        else:
            assert own is value
        del optimizer.state[net.model[0].weight]["own"]
        train_step(net, optimizer)


def test_state_of_the_optimizer_as_a_whole() -> None:
    net, optimizer = small()
    optimizer.state["step"] = 3  # pyright: ignore[reportArgumentType]
    net.resize({"0": [0, 2, -1]}, optimizer)
    optimizer.state["flat"] = torch.zeros(50)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlasticError, match=r"Adam keeps state 'flat' of shape \(50,\) for a parameter; it cannot"):
        net.resize({"0": [0]}, optimizer)
