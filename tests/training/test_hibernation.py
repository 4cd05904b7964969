"""Cutting what hibernates gives the training trajectory that masking it would give, for the same draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from plasticnet import PlasticNet
from plasticnet.learning.coupling import Draw
from plasticnet.learning.estimators import Estimator
from plasticnet.learning.sampler import Source
from tests.kit.networks import ConvNet, images, mlp

STEPS = 12


def positions(cut: dict[str, list[int]], net: PlasticNet) -> Tensor:
    """Where the units that stay stand among the gates of all."""
    start, kept = 0, []
    for name, site in net.sites.items():
        kept += [start + i for i in range(len(site)) if i not in cut.get(name, [])]
        start += len(site)
    return torch.tensor(kept)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("network", ["mlp per sample", "convolutions per batch", "input features"])
def test_cutting_equals_masking(network: str, optimizer: str) -> None:
    drawn: list[Tensor] = []
    kept = torch.zeros(0)

    def source(net: PlasticNet) -> Source:
        """Each gate of the small network is drawn as in the whole one."""

        def draw(estimator: Estimator, pi: Tensor, *_: Any) -> Draw:
            return Draw(pi, (drawn.pop(0)[:, kept] if net is small else drawn[0])[None])

        return draw

    nets: list[PlasticNet] = []
    optimizers: list[Optimizer] = []
    convolutions = network == "convolutions per batch"
    x = images(9).double() if convolutions else torch.randn(9, 5).double()
    y = torch.arange(9) % 3
    for _ in range(2):
        torch.manual_seed(0)
        model: Any = ConvNet(dropout=False) if convolutions else mlp(5, 7, 6, 3)
        inputs = ("2",) if network == "input features" else ()
        net = PlasticNet(model.double(), (x[:2],), inputs=inputs, estimator="disarm")
        net.k = 2.0
        net.sampler.source = source(net)
        kind = {"sgd": lambda g: SGD(g, momentum=0.9), "adam": lambda g: Adam(g)}[optimizer]
        groups: Any = net.param_groups(1e-2)
        for group in groups:
            group.pop("betas", None)
        nets.append(net)
        optimizers.append(kind(groups))
    whole, small = nets
    cut = {"conv1": [0, 3], "fc1": [2]} if convolutions else {"0": [1, 4], "2": [5]}
    hibernating = dict(cut)
    rows = 1 if convolutions else 9

    def step(net: PlasticNet, optimizer: Optimizer) -> Tensor:
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        loss = loss + net.penalty(0.1, cost="parameters", scale="log")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for net in nets:
        net.train()
    for _ in range(3):  # moments, before anything hibernates
        for net, o in zip(nets, optimizers, strict=True):
            drawn[:] = [torch.rand(rows, sum(len(s) for s in net.sites.values()), dtype=torch.float64)]
            kept = torch.arange(drawn[0].shape[1])
            torch.manual_seed(0)
            drawn[0].uniform_()
            step(net, o)
    with torch.no_grad():
        for net in nets:
            for name, units in hibernating.items():
                net.sites[name].phi[units] = -20.0  # pi = 4e-18
    sources = {n: [i for i in range(len(small.sites[n])) if i not in units] for n, units in cut.items()}
    sizes = {n: len(s) for n, s in whole.sites.items()}
    small.resize(sources, optimizers[1])
    if network == "input features":  # the features of a unit go with it
        cut["2.input"] = cut["0"]
    kept = positions(cut, whole)
    assert sum(len(s) for s in small.sites.values()) == len(kept) < sum(sizes.values())
    for _ in range(STEPS):
        drawn[:] = [torch.rand(rows, sum(sizes.values()), dtype=torch.float64)]
        torch.testing.assert_close(step(whole, optimizers[0]), step(small, optimizers[1]), rtol=1e-9, atol=1e-9)
        assert not drawn
    left = whole.compact()
    for (name, one), (_, other) in zip(left.named_parameters(), small.compact().named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)
    for name, site in small.sites.items():
        phi = whole.sites[name].phi.detach()
        stays = [i for i in range(len(phi)) if i not in cut.get(name, [])]
        torch.testing.assert_close(site.phi.detach(), phi[stays], rtol=1e-8, atol=1e-10)
