"""What single units are missed by: equal to closing each of them in turn, and nothing else is changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import PlasticNet
from plasticnet.learning.missed import Missed, in_turn
from tests.kit.networks import ConvNet, assert_same, images, mlp

ROWS = 12


def plastic(model: nn.Module, x: Tensor, **options: Any) -> PlasticNet:
    """A network in a plastic stage whose units are all held open."""
    net = PlasticNet(model, (x,), **options)
    net.k = 7.0
    for site in net.sites.values():
        site.grace.fill_(2)
    return net.train()


def asked(net: PlasticNet, units: list[int] | None = None) -> Missed:
    sizes = tuple(map(len, net.sites.values()))
    net.sampler.missed = Missed(torch.tensor(list(range(sum(sizes))) if units is None else units), sizes)
    return net.sampler.missed


def rises(net: PlasticNet, x: Tensor, y: Tensor) -> Tensor:
    """What closing each unit adds to the loss of each sample, shape (units, batch)."""
    twin = copy.deepcopy(net)
    twin.k, twin.sampler.missed = math.inf, None
    found = []
    with torch.no_grad():
        base = F.cross_entropy(twin(x), y, reduction="none")
        for site in twin.sites.values():
            site.grace.zero_()
            for i in range(len(site)):
                before = site.phi.clone()
                site.phi[i] = -1.0
                found.append(F.cross_entropy(twin(x), y, reduction="none") - base)
                site.phi.copy_(before)
    return torch.stack(found)


def step(net: PlasticNet, x: Tensor, y: Tensor) -> Tensor:
    return net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))


def test_each_sample_closes_the_unit_whose_turn_it_is() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 4).double(), torch.randint(3, (ROWS,))
    net = plastic(mlp(4, 5, 3, 3).double(), x)
    expected, missed = rises(net, x, y), asked(net)
    step(net, x, y)
    sums, counts = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for row in range(ROWS):
        sums[row % 8] += expected[row % 8, row]
        counts[row % 8] += 1
    torch.testing.assert_close(missed.rises, sums, rtol=1e-9, atol=1e-12)
    assert_same(missed.counts, counts)
    assert (missed.steps, missed.turn) == (1, ROWS % 8)
    step(net, x, y)  # goes on where it was
    for row in range(ROWS):
        sums[(row + ROWS) % 8] += expected[(row + ROWS) % 8, row]
    torch.testing.assert_close(missed.rises, sums, rtol=1e-9, atol=1e-12)


def test_all_turns_together_are_the_exact_means() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 4).double(), torch.randint(3, (7,))
    net = plastic(mlp(4, 3, 2, 3).double(), x)
    missed = asked(net)
    for _ in range(5):  # in 5 steps of 7 samples, each of the 5 units meets each sample once
        step(net, x, y)
    torch.testing.assert_close(missed.rises / missed.counts, rises(net, x, y).mean(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_batch_that_shares_its_gates_closes_one_unit(reduction: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 4).double(), torch.randint(3, (ROWS,))
    net = plastic(mlp(4, 5, 3, 3).double(), x, gates="batch")
    expected, missed = rises(net, x, y).mean(1), asked(net)
    for _ in range(8):
        net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction=reduction))
    torch.testing.assert_close(missed.rises, expected, rtol=1e-9, atol=1e-12)
    assert_same(missed.counts, torch.ones(8, dtype=torch.float64))


def test_with_batch_statistics_the_running_ones_are_compared() -> None:
    torch.manual_seed(0)
    x, y = images(ROWS), torch.randint(3, (ROWS,))
    net = plastic(ConvNet(), x)
    missed, twin = asked(net), copy.deepcopy(net).eval()
    units = sum(map(len, net.sites.values()))
    before = [b.clone() for b in net.buffers()]
    for _ in range(units):
        step(net, x, y)
        for b, value in zip(net.buffers(), before, strict=True):
            b.copy_(value)
    torch.testing.assert_close(missed.rises, rises(twin, x, y).mean(1).double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_the_training_is_that_without_it(model: str) -> None:
    """Losses, gradients, random numbers and buffers are equal to the bit, dropout and batch statistics included."""

    def run(measured: bool) -> tuple[Any, ...]:
        torch.manual_seed(0)
        x = torch.randn(ROWS, 8) if model == "mlp" else images(ROWS)
        y = torch.randint(3, (ROWS,))
        module = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3))
        net = plastic(
            module if model == "mlp" else ConvNet(dropout=0.3), x, gates="sample" if model == "mlp" else "auto"
        )
        if measured:
            asked(net)
        net.zero_grad()
        losses = []
        for _ in range(3):
            loss = step(net, x, y)
            loss.backward()
            losses.append(loss.detach())
        return losses, [p.grad for p in net.model.parameters()], dict(net.named_buffers()), torch.get_rng_state()

    assert_same(run(True), run(False))


def test_a_network_of_another_size_is_not_measured() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 4), torch.randint(3, (ROWS,))
    net = plastic(mlp(4, 3, 3), x)
    missed = asked(net)
    net.resize({"0": [0]})
    step(net, x, y)
    assert missed.steps == 1
    assert not missed.counts.any()


def test_sites_take_turns_whatever_their_widths() -> None:
    assert in_turn([(range(4), 1), ((5, 6), 1)]) == [0, 5, 1, 2, 6, 3]
    assert sorted(in_turn([(range(4), 1), ((5, 6), 1)])) == [0, 1, 2, 3, 5, 6]


def test_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 4), torch.randint(3, (ROWS,))
    net = plastic(mlp(4, 5, 3), x)
    missed = asked(net, [1, 3, 4])
    step(net, x, y)
    again = Missed.from_state(missed.state_dict())
    assert again.state_dict() == missed.state_dict()
    step(net, x, y)
    net.sampler.missed = again
    step(net, x, y)
    assert again.state_dict() == missed.state_dict()
