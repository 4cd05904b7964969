"""Adversarial networks: exact where they are gated, frozen with the reason where not, never a crash."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam
from torch.utils._pytree import tree_map

import plasticnet as pn
from tests.kit import adversarial_layers, adversarial_networks
from tests.kit.adversarial import CASES, PIECES, Between, Case, images
from tests.kit.adversarial_checks import (
    check_exact,
    check_expectation,
    check_life,
    close_units,
    distance,
    double,
    loss_of,
    precise,
    train,
)
from tests.kit.draws import last_draw

assert adversarial_layers.__doc__
assert adversarial_networks.__doc__  # importing registers the cases


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_expectation(case: Case) -> None:
    check_expectation(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_closing_cutting_and_growing(case: Case, tmp_path: Path) -> None:
    check_life(case.factory, case.inputs(), tmp_path)


def is_exact(name: str) -> bool:
    return len(CASES[name].exact) > 1


exact_pieces = st.sampled_from(sorted(filter(is_exact, PIECES)))
pieces = st.lists(exact_pieces, min_size=2, max_size=5) | st.lists(
    exact_pieces | st.sampled_from(sorted(PIECES)), min_size=2, max_size=4
)


@pytest.mark.slow
@given(pieces, st.integers(0, 2**20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_chains_of_pieces(names: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    model = Between(nn.Sequential(*[PIECES[name](8) for name in names]))
    x = tree_map(double, images())
    net = pn.PlasticNet(precise(model), x)
    assert "b" in net.sites
    assert all(net.frozen.values())
    check_exact(net, x, net.eval()(*x))
    optimizer = Adam(net.param_groups(1e-3))
    net.k = math.inf
    net.prune(0.5, optimizer)
    growable = {n: 1 for n, s in net.sites.items() if s.units.growable}
    before = net.eval()(*x)
    net.grow(growable, optimizer)
    assert distance(before, net.eval()(*x)) <= 1e-9
    net.k = 2.0
    train(net, optimizer, x)
    check_exact(net, x, net.eval()(*x))


def test_other_branch() -> None:
    """Whichever branch the input takes, compaction changes nothing."""
    case = CASES["OtherBranch"]
    net = pn.PlasticNet(precise(case.factory()), tree_map(double, case.inputs()))
    close_units(net, 0.5)
    for x in (torch.randn(3, 4).double(), torch.randn(3, 4).double() + 50):
        assert distance(net.eval()(x), net.compact()(x)) <= 1e-9


def test_channels_last_is_kept() -> None:
    case = CASES["ChannelsLast"]
    net = pn.PlasticNet(case.factory(), case.inputs())
    optimizer = Adam(net.param_groups(1e-3))
    net.k = 2.0
    train(net, optimizer, case.inputs())
    net.resize({"a": [0, 2, 3, -1], "b": [1, 4, -1]}, optimizer)
    small = net.compact()
    for model in (net.model, small):
        for name in ("a", "b"):
            weight = model.get_parameter(f"{name}.weight")
            assert weight.is_contiguous(memory_format=torch.channels_last)
            assert not weight.is_contiguous()
    moments = optimizer.state[net.model.a.weight]["exp_avg"]
    assert moments.shape == net.model.a.weight.shape
    assert net(*case.inputs()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "name",
    [
        "FlatRows",
        "WindowAttention",
        "TimeFirst",
        "StepsLikeSamples",
    ],
)
def test_gates_are_drawn_per_batch_where_rows_are_not_samples(name: str) -> None:
    """Example inputs with as many steps as samples, training with another number of samples."""
    case = CASES[name]
    net = pn.PlasticNet(case.factory(), case.inputs())
    net.k = 3.0
    for n in (6, 3):
        x, *rest = case.inputs()
        x = torch.randn(n, *x.shape[1:])
        net.train()
        net.expected_loss(lambda x=x, rest=rest: loss_of(net(x, *rest), n)).backward()  # noqa: B023
        assert last_draw(net) is not None
        assert last_draw(net).rows == 1


@pytest.mark.parametrize(("name", "dtype"), [("Half", torch.float16), ("MixedHalf", torch.bfloat16)])
def test_low_precision_is_kept(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    net = pn.PlasticNet(case.factory(), case.inputs())
    kept = {n: p.dtype for n, p in net.model.named_parameters()}
    close_units(net, 0.4)
    x = case.inputs()
    assert distance(net.eval()(*x), net.compact()(*x)) <= 0.02
    optimizer = SGD(net.param_groups(1e-3))  # in half precision Adam divides by its epsilon, which is 0
    net.k = 2.0
    train(net, optimizer, x)
    net.resize({"a": [0, 2, -1], "b": [0, 1, -1]}, optimizer)
    train(net, optimizer, x)
    assert kept == {n: p.dtype for n, p in net.model.named_parameters()}
    assert dtype in kept.values()
    assert all(s.phi.dtype == torch.float32 for s in net.sites.values())


def test_two_shuffles_in_a_row() -> None:
    x = tree_map(double, images())
    net = pn.PlasticNet(precise(Between(nn.Sequential(PIECES["shuffle"](8), PIECES["shuffle"](8)))), x)
    assert {n: len(s) for n, s in net.sites.items()} == {"a": 2, "b": 5}
    check_exact(net, x, net.eval()(*x))


@pytest.mark.parametrize("init", ["preserve", "random"])
def test_complex_layers_grow(init: str) -> None:
    case = CASES["ComplexOutput"]
    x = tree_map(double, case.inputs())
    net = pn.PlasticNet(precise(case.factory()), x)
    before = net.eval()(*x)
    net.resize({"a": [0, 2, 3, 4, 5, -1, -1], "b": [0, 1, 2, 3, 4, -1]}, init=init)
    after = net.compact()(*x)
    assert distance(net.eval()(*x), after) <= 1e-9
    assert distance(before, after) > 1e-6  # a unit is gone
    assert net.model.a.weight.imag[-1].abs().min() > 0
