"""No two networks that live gate the same parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from plasticnet import PlasticError, PlasticNet
from tests.kit.networks import mlp

X = torch.randn(2, 4)


def gate(model: nn.Module, width: int = 4, **options: object) -> PlasticNet:
    return PlasticNet(model, (torch.randn(2, width),), **options)  # pyright: ignore[reportArgumentType]


def test_a_second_network_over_a_model_is_refused_while_the_first_one_lives() -> None:
    model = mlp(4, 6, 3)
    net = gate(model)
    with pytest.raises(PlasticError, match=r"Sequential: another PlasticNet has gates.*'0.weight'.*del net.*deepcopy"):
        gate(model)
    net.resize({"0": [0, 2, -1]})  # the first one is as it was
    with pytest.raises(PlasticError, match="another PlasticNet"):
        gate(model)
    expected = net.eval()(X)
    del net  # it refers to itself, so that it is not gone at once
    assert torch.equal(gate(model).eval()(X), expected)


def test_parts_and_wholes_are_refused() -> None:
    model = mlp(4, 6, 5, 3)
    net = gate(model)
    first, second = model[0], model[2]
    for other, width in (
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), first), 3),  # reads a gated layer, whose site it does not have
        (nn.Sequential(second, nn.Tanh(), nn.Linear(5, 2)), 6),
        (nn.Sequential(nn.Linear(2, 4), nn.Tanh(), model), 2),
    ):
        with pytest.raises(PlasticError, match="another PlasticNet"):
            gate(other, width)
    shared = nn.Linear(6, 5)
    shared.weight = second.weight  # one parameter in two modules
    with pytest.raises(PlasticError, match="another PlasticNet"):
        gate(nn.Sequential(shared, nn.Tanh(), nn.Linear(5, 2)), 6)
    del net
    gate(model[2:], 6)


def test_what_no_gate_acts_on_may_be_shared() -> None:
    """Two heads on a backbone that has no gates, and a module without parameters."""
    backbone, act = nn.Linear(4, 6), nn.Tanh()
    one = gate(nn.Sequential(backbone, act, nn.Linear(6, 5), act, nn.Linear(5, 2)), exclude=("0",))
    two = gate(nn.Sequential(backbone, act, nn.Linear(6, 7), act, nn.Linear(7, 2)), exclude=("0",))
    one.resize({"2": [0, 1]})
    two.resize({"2": [0, 1, 2]})
    assert one.eval()(X).shape == two.eval()(X).shape == (2, 2)


def test_copies_are_free_and_have_owners_of_their_own() -> None:
    model = mlp(4, 6, 3)
    net = gate(model)
    gate(copy.deepcopy(model))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with pytest.raises(PlasticError, match="another PlasticNet"):
            gate(twin.model)
    plain = net.compact()
    gate(plain)


def test_a_network_that_could_not_be_made_holds_nothing() -> None:
    model = mlp(4, 6, 3)
    with pytest.raises(PlasticError, match="matches none"):
        gate(model, exclude=("9",))
    net = gate(model)
    for _ in range(2):
        with pytest.raises(PlasticError, match="another PlasticNet"):
            gate(model)
    del net
    gate(model)
