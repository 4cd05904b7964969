"""Mixtures that treat experts in a way that shows in training, or for few rows only: exact in both modes, or frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.checking.draws import EvenDraws
from tests.kit.networks import randomise_gates

E = 6  # the number of experts


class Mixture(nn.Module):
    """Six experts, of which each row goes to some, or to all.

    Args:
        way: What is done with the probabilities.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.num_experts = way, E
        self.stem, self.gate, self.head = nn.Linear(4, 8), nn.Linear(8, E, bias=False), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 8)) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        logits = self.gate(x)
        if self.way == "largest answer":
            every = [logits.sigmoid()[:, i, None] * expert(x) for i, expert in enumerate(self.experts)]
            return self.head(x + torch.stack(every).amax(0))
        if self.way == "uniform in training" and self.training:
            p = 0.9 * logits.softmax(-1) + 0.1 / logits.shape[1]
        else:
            p = logits.softmax(-1)
        weights, chosen = p.topk(4 if self.way == "more in training" and self.training else 2, -1)
        if self.way == "a pair":
            weights = weights * torch.where((chosen == 2).any(1) & (chosen == 5).any(1), 2.0, 1.0).to(x)[:, None]
        out = self.head(x + self.dispatched(x, weights, chosen))
        if self.way == "balanced in training" and self.training:
            share = torch.zeros_like(p).scatter(1, chosen, 1.0).mean(0)
            return out, self.num_experts * (share * p.mean(0)).sum()
        return out

    def dispatched(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == i)
            if self.training and self.way.startswith("capacity"):
                count = len(self.experts) if self.way == "capacity by length" else self.num_experts
                rows, places = (t[: 2 * len(x) // count] for t in (rows, places))
            if len(rows):
                y = y.index_add(0, rows, expert(x[rows]) * weights[rows, places, None])
        return y


def differences(net: pn.PlasticNet) -> list[float]:
    """Return how far the gated network and the compact module are apart, in both modes, for random closed experts."""
    found: list[float] = []
    for _ in range(6):
        for training in (False, True):
            randomise_gates(net)
            if "experts.members" in net.sites:
                with torch.no_grad():
                    net.sites["experts.members"].phi.uniform_(-1, 1)
            x, small = torch.randn(30, 4, dtype=torch.float64), net.eval().compact()
            net.k = float("inf")
            with torch.no_grad(), EvenDraws():
                outputs = [model.train(training)(x) for model in (net, small)]
            whole, cut = ([out] if isinstance(out, Tensor) else out for out in outputs)
            found += [float((a - b).abs().max()) for a, b in zip(whole, cut, strict=True)]
    return found


def gated(way: str) -> pn.PlasticNet:
    torch.manual_seed(0)
    return pn.PlasticNet(Mixture(way).double(), (torch.randn(40, 4, dtype=torch.float64),), experts="experts")


@pytest.mark.parametrize(
    ("way", "least"), [("balanced in training", 2), ("capacity by attribute", 2), ("more in training", 4)]
)
def test_experts_are_cut_exactly_in_training_mode_too(way: str, least: int) -> None:
    net = gated(way)
    assert net.sites["experts.members"].minimum == least
    assert max(differences(net)) <= 1e-9


@pytest.mark.parametrize(("target", "frozen"), [pytest.param("mean", True, marks=pytest.mark.slow), ("fixed", False)])
def test_what_training_keeps_for_each_expert_is_cut_exactly_or_they_are_frozen(target: str, frozen: bool) -> None:
    class Balanced(Mixture):
        """Raises the bias of experts with few rows, as it trains."""

        bias: Tensor

        def __init__(self) -> None:
            super().__init__("biased")
            self.register_buffer("bias", torch.zeros(E))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            scores = self.gate(x).sigmoid()
            chosen = (scores + self.bias).topk(2, -1)[1]
            if self.training:
                rows = torch.zeros_like(scores).scatter(1, chosen, 1.0).sum(0)
                self.bias += 0.001 * torch.sign((rows.mean() if target == "mean" else 10) - rows)
            return self.head(x + self.dispatched(x, scores.gather(1, chosen), chosen))

    torch.manual_seed(0)
    net = pn.PlasticNet(Balanced().double(), (torch.randn(40, 4, dtype=torch.float64),), experts="experts")
    if frozen:
        assert "keeps for its next call in bias" in net.frozen["experts.members"]
        return
    with torch.no_grad():
        net.sites["experts.members"].phi.copy_(torch.tensor([1.0, -1, 1, -1, 1, 1]))
    small = net.eval().compact().train()
    net.k = float("inf")
    x = torch.randn(50, 30, 4, dtype=torch.float64)
    whole, cut = ([model(rows) for rows in x] for model in (net.train(), small))
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small.get_buffer("bias"), net.model.get_buffer("bias")[[0, 2, 4, 5]])


@pytest.mark.parametrize(
    "way",
    ["capacity by length", "uniform in training", "largest answer", pytest.param("a pair", marks=pytest.mark.slow)],
)
def test_experts_are_frozen_where_few_rows_or_training_alone_show_a_difference(way: str) -> None:
    net = gated(way)
    assert "changes the output" in net.frozen["experts.members"]
    assert max(differences(net)) <= 1e-9
