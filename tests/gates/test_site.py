"""Probabilities and their limits, evaluation by the mean, and the two forms in which gates multiply."""

from __future__ import annotations

import math

import pytest
import torch

from plasticnet import PlasticError, PlasticNet
from plasticnet.gates.site import probability
from tests.kit.draws import last_draw
from tests.kit.networks import ConvNet, images, mlp, randomise_gates


def test_probability_has_its_limits() -> None:
    phi = torch.tensor([-math.inf, -40.0, -0.1, 0.0, 0.1, 40.0, math.inf])
    assert torch.equal(probability(phi, 0.0), torch.full((7,), 0.5))
    assert probability(phi, math.inf).tolist() == [0, 0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(probability(phi, 3.0), torch.sigmoid(3 * phi))
    assert probability(torch.tensor([3 / 7]), 7.0).item() == pytest.approx(0.95, abs=0.01)


def test_evaluation_uses_the_mean() -> None:
    net = PlasticNet(mlp(3, 4, 2), (torch.randn(2, 3),))
    with torch.no_grad():
        net.sites["0"].phi.copy_(torch.tensor([-0.2, 0.0, 0.2, 1.0]))
    net.k = 2.0
    gates = net.sites["0"].mean_gate(2.0)
    torch.testing.assert_close(
        gates, torch.tensor([0.0, 0.5, torch.sigmoid(torch.tensor(0.4)), 0.8808]), atol=1e-4, rtol=0
    )
    net.eval()
    x = torch.randn(5, 3)
    model = net.model
    torch.testing.assert_close(net(x), model[2](model[1](model[0](x)) * gates))


@pytest.mark.parametrize("inputs", [(), ("fc1",)])
def test_hooks_and_folding_agree(inputs: tuple[str, ...]) -> None:
    """The same gates for every sample, through the activations and through the weights."""
    net = PlasticNet(ConvNet(norm=False), (images(),), inputs=inputs, gates="sample")
    net.k = 1.0
    randomise_gates(net)
    with torch.no_grad():  # certain gates: every draw is the same
        for site in net.sites.values():
            site.phi.mul_(1e4)
    net.resize({"conv3": [0, 1, 3]})
    x = images(5)
    net.train()
    hooked = net(x)
    assert last_draw(net) is not None
    assert last_draw(net).rows == 5
    net.sampler.mode = "batch"
    torch.testing.assert_close(net(x), hooked, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in net.model.modules())


def test_a_batch_that_is_not_the_networks() -> None:
    net = PlasticNet(mlp(3, 4, 2), (torch.randn(2, 3),), gates="sample")
    net.k = 2.0
    net.train()
    with pytest.raises(PlasticError, match="batches of 2 and of 3"):
        net.expected_loss(lambda: net(torch.randn(2, 3)).sum() + net(torch.randn(3, 3)).sum())
