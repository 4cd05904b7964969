"""``residual=True``: networks whose norms take their statistics over the open units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.draws import last_draw
from tests.kit.norms import GRN, RMS


def last(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 3))


class Convolutional(nn.Module):
    def __init__(self, norm: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 5, 1)
        self.order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
        self.back = (0, 3, 1, 2) if channels_last else (0, 1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x).permute(self.order)).permute(self.back)).mean((2, 3))


class Residual(nn.Module):
    """A stream that norms read, and that layers add to."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(norm(8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + layer(norm(x)).relu()
        return self.head(self.norms[-1](x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {  # model, input, a masked site
    "LayerNorm": (lambda: last(nn.LayerNorm(8)), (5, 4), "0"),
    "RMSNorm": (lambda: last(nn.RMSNorm(8)), (5, 4), "0"),
    "custom RMSNorm": (lambda: last(RMS(8)), (5, 4), "0"),
    "custom RMSNorm, dropped": (lambda: last(RMS(8, "dropped")), (5, 4), "0"),
    "GRN": (lambda: Convolutional(GRN(8), True), (5, 3, 2, 2), "a"),
    "GroupNorm": (lambda: Convolutional(nn.GroupNorm(1, 8), False), (5, 3, 2, 2), "a"),
    "stream of LayerNorm": (lambda: Residual(nn.LayerNorm), (5, 4), "stem"),
    "stream of custom RMSNorm": (lambda: Residual(RMS), (5, 4), "stem"),
}


def close_half(net: pn.PlasticNet, k: float) -> None:
    net.k = k
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.copy_(torch.rand_like(site.phi) * 0.4 + 0.02)
            site.phi[torch.randperm(len(site))[: len(site) // 2]] *= -1


@pytest.mark.parametrize("k", [math.inf, 7.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_compact_equals_eval(name: str, k: float) -> None:
    make, shape, masked = NETWORKS[name]
    x = torch.randn(shape).double()
    net = pn.PlasticNet(make().double(), x, residual=True)
    assert len(net.sites[masked]) == 8
    assert not net.gating.per_sample[masked]
    close_half(net, k)
    net.eval()
    small, out = net.compact(), net(x)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in net.model.parameters())
    assert (small(x) - out).abs().max() <= 1e-9 * out.abs().max()
    net.prune()
    assert (net(x) - out).abs().max() <= 1e-9 * out.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_all_units_closed(name: str) -> None:
    make, shape, masked = NETWORKS[name]
    x = torch.randn(shape).double()
    net = pn.PlasticNet(make().double(), x, residual=True)
    with torch.no_grad():
        net.sites[masked].phi.fill_(-1.0)
    out = net.eval()(x)
    assert out.isfinite().all()
    assert (net.compact()(x) - out).abs().max() <= 1e-9


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "GroupNorm"])
def test_without_residual_what_is_normalised_is_frozen(name: str) -> None:
    make, shape, masked = NETWORKS[name]
    traced = pn.trace(make(), (torch.randn(shape),))
    assert masked not in traced.sites
    assert "residual=True" in traced.frozen[masked]


def test_without_residual_one_group_is_one_unit() -> None:
    make, shape, masked = NETWORKS["GroupNorm"]
    assert pn.trace(make(), (torch.randn(shape),)).sites[masked].size == 1


def test_masked_sites_are_drawn_per_batch() -> None:
    net = pn.PlasticNet(last(nn.LayerNorm(8)), (torch.randn(5, 4),), residual=True, gates="sample")
    assert net.gating.per_sample == {"0": False, "3": True}
    net.k = 1.0
    net.train()
    net(torch.randn(6, 4))
    assert last_draw(net) is not None
    u = last_draw(net).u[0]
    assert u.shape == (6, 14)
    assert (u[:, :8] == u[:1, :8]).all()
    assert not (u[:, 8:] == u[:1, 8:]).any(1)[1:].any()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        mask = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device=y.device).triu(1)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LM(nn.Module):
    """A pre-norm language model whose head is not tied to its embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, width), nn.Parameter(torch.randn(5, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.position)))


def test_language_model() -> None:
    ids = torch.randint(11, (6, 5))
    frozen = pn.trace(LM(), (ids,))
    assert "residual=True" in frozen.frozen["embedding"]
    net = pn.PlasticNet(LM().double(), (ids,), residual=True)
    assert len(net.sites["embedding"]) == 8
    owned = {s.tensor for s in net.sites["embedding"].units.slices}
    assert {"embedding.weight", "position", "blocks.1.down.weight", "norm.weight", "head.weight"} <= owned
    net.k = 3.0
    optimizer = torch.optim.Adam(net.param_groups(1e-2))

    def step() -> None:
        net.train()
        y = ids.roll(-1, 1)
        loss = net.expected_loss(
            lambda: F.cross_entropy(net(ids).transpose(1, 2), y, reduction="none").mean(1)
        ) + net.penalty(1e-2, "macs", "log")
        optimizer.zero_grad()
        loss.backward()
        for site in net.sites.values():
            assert site.phi.grad is not None
            assert site.phi.grad.shape == site.phi.shape
            assert site.phi.grad.isfinite().all()
            assert site.phi.grad.any()
        optimizer.step()

    for _ in range(3):
        step()
    close_half(net, 3.0)
    out = net.eval()(ids)
    assert net.prune(optimizer=optimizer)["embedding"] == 4
    assert net.model.embedding.weight.shape == (11, 4)
    assert net.model.position.shape == (5, 4)
    assert (net.eval()(ids) - out).abs().max() <= 1e-9 * out.abs().max()
    assert (net.compact()(ids) - out).abs().max() <= 1e-9 * out.abs().max()
    step()
    with pytest.raises(pn.PlasticError, match="not gain any"):  # new units would move the statistics
        net.grow({"embedding": 1}, optimizer)


class TiedLM(LM):
    """A language model whose last layer reads the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("k", [3.0, math.inf])
def test_a_table_that_the_last_layer_reads(k: float, tmp_path: Path) -> None:
    ids = torch.randint(11, (6, 5))
    net = pn.PlasticNet(TiedLM().double(), (ids,), residual=True)
    assert len(net.sites["embedding"]) == 8
    net.k = k
    close_half(net, k)
    out = net.eval()(ids)
    small: Any = net.compact()
    assert small.head.weight is small.embedding.weight
    assert small.head.weight.shape == (11, 4)
    assert small.head.in_features == small.embedding.embedding_dim == 4
    torch.testing.assert_close(small(ids), out, rtol=0, atol=1e-9)
    pn.save(small, tmp_path / "small.safetensors")
    again: Any = pn.load(tmp_path / "small.safetensors", lambda: TiedLM().double())
    assert again.head.weight is again.embedding.weight
    torch.testing.assert_close(again(ids), out, rtol=0, atol=1e-9)


# -- the estimate -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["arms", "bitflip-cv"])
def test_unbiased(estimator: str) -> None:
    """Against the sum over all patterns, in which the norm is taken over the open entries by hand. (A
    pattern without any keeps none of the norm's output, which no consumer reads.)"""
    draws, n = 1200, 5
    torch.manual_seed(3)
    first, norm, readout = nn.Linear(4, n), nn.LayerNorm(n), nn.Linear(n, 3)
    nn.init.normal_(norm.bias)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    net = pn.PlasticNet(nn.Sequential(first, norm, readout), x, residual=True, estimator=estimator)
    net.k = 2.0
    phi = net.sites["0"].phi
    with torch.no_grad():
        phi.copy_(torch.tensor([-0.3, 0.0, 0.3, 0.5, 0.9]))
    logits = phi.detach().clone().requires_grad_()
    pi, total = torch.sigmoid(2.0 * logits), torch.zeros(())
    for pattern in itertools.product([False, True], repeat=n):
        z = torch.tensor(pattern)
        h = F.layer_norm(first(x)[:, z], (int(z.sum()),), norm.weight[z], norm.bias[z]) if z.any() else x[:, :0]
        f = F.cross_entropy(F.linear(h, readout.weight[:, z], readout.bias), y).detach()
        total = total + torch.where(z, pi, 1 - pi).prod() * f
    (exact,) = torch.autograd.grad(total, logits)
    net.train()
    estimates = []
    for _ in range(draws):
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        assert loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, phi)
        estimates.append(gradient)
    stacked = torch.stack(estimates)
    error = stacked.std(0) / draws**0.5
    assert ((stacked.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all()
    assert (error < exact.abs().max()).all()
