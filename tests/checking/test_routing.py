"""Models in which values decide which modules run: mixtures of experts, early exits, branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Mixture(nn.Module):
    """The best of some experts for every token.

    Args:
        way: How tokens reach their expert.
        experts: The number of experts.
    """

    def __init__(self, way: str, experts: int = 4) -> None:
        super().__init__()
        self.way, self.stem, self.router, self.head = way, nn.Linear(6, 12), nn.Linear(6, experts), nn.Linear(12, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.router(x).softmax(-1).max(-1)
        x = self.stem(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = choice == i
            if self.way == "masks":
                if chosen.any():
                    y = y + expert(x) * (chosen * weight)[:, None]
            elif len(rows := chosen.nonzero()[:, 0]):
                if self.way == "rows":
                    y[rows] = y[rows] + expert(x[rows]) * weight[rows, None]
                else:
                    y.index_add_(0, rows, expert(x[rows]) * weight[rows, None])
        return self.head(x + y)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(20, 3)
        self.small, self.big = nn.Linear(12, 20), nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 20))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        return self.head((self.small(h) if x.mean() > 0 else self.big(h)).relu())


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.layers, self.exits = (nn.ModuleList(nn.Linear(16, n) for _ in range(3)) for n in (16, 3))

    def forward(self, x: Tensor) -> Tensor:
        y, h = x, self.stem(x)
        for layer, leave in zip(self.layers, self.exits, strict=True):
            h = layer(h).relu()
            y = leave(h)
            if y.softmax(-1).amax(-1).mean() > 0.4:
                break
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rows": lambda: Mixture("rows"),
    "index_add": lambda: Mixture("index_add"),
    "masks": lambda: Mixture("masks"),
    "many experts": lambda: Mixture("masks", 24),
    "branches": Branching,
    "early exit": EarlyExit,
}


def inputs_for(model: nn.Module) -> list[Tensor]:
    """Inputs that reach different modules."""
    x = torch.randn(200, 6).double()
    if isinstance(model, Mixture):
        choice = model.router(x).argmax(-1)
        return [x[choice == choice[0]][:4], x[choice != choice[0]][:1], x]
    return [x[:4] + 3, x[:4] - 3, x[:4] * 0.01]


@pytest.mark.parametrize("name", MODELS)
def test_sites_do_not_depend_on_the_values_of_the_example_inputs(name: str) -> None:
    first = MODELS[name]().double()
    examples = inputs_for(first)
    nets = []
    for x in examples:
        model = MODELS[name]().double()
        model.load_state_dict(first.state_dict())
        nets.append(pn.PlasticNet(model, (x,)))
    net, *others = nets
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[torch.randperm(len(site))[: len(site) // 2]] = -1
        small = net.eval().compact()
        for x in examples:
            assert (net(x) - small(x)).abs().max() <= 1e-9
        net.prune()
        for other in others:
            assert list(other.sites) == list(net.sites)
            other.load_state_dict(net.state_dict())
            for x in examples:
                assert (other.eval()(x) - small(x)).abs().max() <= 1e-9


class ByToken(nn.Module):
    """An expert for each class of tokens, which no random parameters change."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 12), nn.Linear(12, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        for expert in self.experts:
            expert.up, expert.down = nn.Linear(12, width), nn.Linear(width, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.experts[int(tokens[0, 0]) % 3](self.table(tokens)).relu())


def test_what_no_run_reaches_is_named_with_the_way_out() -> None:
    tokens = torch.tensor([[3, 6], [9, 0]])
    net = pn.PlasticNet(ByToken(16), (tokens,), residual=True)
    for name in ("experts.1", "experts.2"):
        assert "did not run" in net.frozen[name]
        assert "more_inputs=[...]" in net.frozen[name]
    assert "it may read these units in another branch" in net.frozen["table"]
    assert not net.sites.keys() & {"table", "experts.0.down"}
    full = pn.PlasticNet(ByToken(16), (tokens,), more_inputs=[tokens + 1, tokens + 2], residual=True)
    assert not any("did not run" in reason for reason in full.frozen.values())
    assert {f"experts.{i}.up" for i in range(3)} <= full.sites.keys()
    with pytest.raises(pn.PlasticError, match=r"Here experts\.1, experts\.2 did not run.*more_inputs"):
        net.load_state_dict(full.state_dict())
    with pytest.raises(pn.PlasticError, match=r"The model is the same, and only its sites are others.*more_inputs"):
        full.load_state_dict(net.state_dict())


def test_an_expert_that_the_check_does_not_reach_is_trusted_like_its_family() -> None:
    """The experts hide a width in their forward, so that none can be cut, whichever the inputs choose."""

    class Fixed(Expert):
        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.up(x))
            return self.down(h + torch.arange(16).to(h) * 0)

    def make() -> nn.Module:
        model = Mixture("masks", 6)
        model.experts = nn.ModuleList(Fixed() for _ in range(6))
        return model.double()

    first = make()
    x = torch.randn(100, 6).double()
    choice = first.router(x).argmax(-1)
    frozen: list[Any] = []
    for example in (x[choice == choice[0]][:2], x):
        model = make()
        model.load_state_dict(first.state_dict())
        net = pn.PlasticNet(model, (example,))
        assert not any(name.endswith("up") for name in net.sites)
        frozen.append(sorted(net.frozen))
    assert frozen[0] == frozen[1]
