"""The default estimator is unbiased through real networks, exactly: over all patterns of gates and all choices of the
unit that is flipped, the mean of what the backward pass gives is the gradient of the expected loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import PlasticNet
from plasticnet.gates.site import probabilities
from plasticnet.learning.coupling import Draw, where_it_matters

K, SCALE = 2.0, 3.0  # of the gates, and of the loss, as a loss scaler does it
Loss = Callable[[nn.Module], Tensor]


class Pooled(nn.Module):
    """A convolution, and features behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.conv(x).tanh(), 2).flatten(1))


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(3), nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Residual(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(4, 3), nn.Sequential(Block(), Block()), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.first(x)))


class Recurrent(nn.Module):
    """An LSTM, whose rows are not samples, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc, self.out = nn.LSTM(4, 2), nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.rnn(x[None])[0][0]).tanh())


def mlp(*norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), *norm, nn.Tanh(), nn.Linear(5, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "per sample": (mlp, {}),
    "per batch": (mlp, {"gates": "batch"}),
    "batch statistics": (lambda: mlp(nn.BatchNorm1d(5)), {}),
    "running statistics": (lambda: mlp(nn.BatchNorm1d(5)), {"gates": "sample"}),
    "input features": (Pooled, {"inputs": ("fc",)}),
    "recurrent": (Recurrent, {}),
    "blocks": (Residual, {"blocks": ("blocks.?",), "exclude": ("blocks.*.up",)}),
    "masked norms": (Residual, {"residual": True, "exclude": ("blocks.*.up",)}),
    "single weights": (lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)), {"weights": ("2",)}),
    "held open": (mlp, {}),
}


def logits(net: PlasticNet) -> list[nn.Parameter]:
    return [g.phi for g in net.all_gates()]


def exact(net: PlasticNet, loss: Loss, running: bool) -> Tensor:
    """The gradient of the expected loss, from the compact modules of all hard gates."""
    with torch.no_grad():
        before = [p.clone() for p in logits(net)]
    phi = torch.cat([p.flatten() for p in before]).requires_grad_()
    held = probabilities(net.all_gates(), K).detach() == 1
    pi = torch.where(held, 1.0, torch.sigmoid(K * phi))
    total = torch.zeros(())
    for pattern in itertools.product([0.0, 1.0], repeat=len(phi)):
        z = torch.tensor(pattern)
        if (z[held] == 0).any():
            continue
        with torch.no_grad():
            for p, part in zip(logits(net), z.split([p.numel() for p in logits(net)]), strict=True):
                p.copy_((2 * part - 1).view_as(p))
            net.k = math.inf
            f = loss(net.compact().train(not running)).mean()
            net.k = K
        total = total + torch.where(z > 0, pi, 1 - pi).prod() * f
    with torch.no_grad():
        for p, own in zip(logits(net), before, strict=True):
            p.copy_(own)
    (gradient,) = torch.autograd.grad(total, phi)
    return gradient


def steps(net: PlasticNet) -> Iterator[float]:
    """Set up every draw of a step in turn; yields its probability."""
    pi = probabilities(net.all_gates(), K).detach()
    parts = [len(s) for s in list(net.sites.values())], [w.phi.numel() for w in list(net.weights.values())]
    units = sum(parts[0])
    sizes = torch.tensor([float(n) for n in (*parts[0], *parts[1]) for _ in range(n)])
    both = bool(units and parts[1])  # then a coin decides which kind is flipped
    choices = []
    for begin, end in ((0, units), (units, len(pi))):
        weights = where_it_matters(pi[begin:end], sizes[begin:end])
        chance = weights / weights.sum() / (2 if both else 1) if len(weights) else weights
        choices += [(begin, i, float(q), torch.where(chance > 0, 1 / chance, 0.0)) for i, q in enumerate(chance) if q]
    for pattern in itertools.product([0.0, 1.0], repeat=len(pi)):
        z = torch.tensor(pattern)
        likely = float(torch.where(z > 0, pi, 1 - pi).prod())
        for kind, i, q, rarity in choices if likely else ():

            def draw(
                begin: int, end: int, rows: int, z: Tensor = z, kind: int = kind, i: int = i, rarity: Any = rarity
            ) -> Draw:
                p = pi[begin:end]
                u = torch.where(z[begin:end] > 0, p / 2, (1 + p) / 2).expand(1, rows, -1).clone()
                return Draw(p, u, torch.full((rows,), i), rarity) if kind == begin else Draw(p, u, None, rarity)

            kinds = itertools.cycle([(0, units), (units, len(pi))] if parts[1] else [(0, units)])
            net.sampler.source = lambda _rule, _pi, _sizes, rows, _shared, draw=draw, kinds=kinds: draw(
                *next(kinds), rows
            )
            yield likely * q


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_exactly_unbiased(case: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1)
        make, options = CASES[case]
        model = make()
        x = torch.randn(4, 2, 2, 4) if isinstance(model, Pooled) else torch.randn(4, 4)
        y = torch.tensor([0, 1, 2, 0])
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.momentum = 0.0  # the statistics stay
                m.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
                m.running_var.uniform_(0.5, 2.0)  # pyright: ignore[reportOptionalMemberAccess]
        net = PlasticNet(model, (x,), **options)
        with torch.no_grad():
            for p in logits(net):
                p.copy_(0.4 * torch.randn_like(p))
        if case == "held open":
            net.sites["0"].grace[1] = 2
        net.k = K

        def loss(module: nn.Module) -> Tensor:
            return F.cross_entropy(module(x), y, reduction="none")

        expected = exact(net, loss, running=case == "running statistics")
        net.train()
        found, mass = torch.zeros_like(expected), 0.0
        for probability in steps(net):
            net.zero_grad()
            (SCALE * net.expected_loss(lambda: loss(net))).backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in logits(net)]
            found += probability * torch.cat([g.flatten() for g in gradients]) / SCALE
            mass += probability
        assert mass == pytest.approx(1)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
