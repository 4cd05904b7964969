"""The dimensions of attention heads as units: with `head_dims`, all heads stay, and each of them becomes smaller."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticError
from tests.kit.networks import randomise_gates

WAYS = ["separate", "packed", "grouped", "by head"]  # how queries, keys and values are laid out


class Attention(nn.Module):
    """Self-attention with four heads of eight dimensions, written out, whose scale is an attribute.

    ``way`` is one of `WAYS`, ``product`` says who multiplies and with which scale, and ``rotary`` how positions turn
    pairs of dimensions.
    """

    def __init__(self, way: str, product: str = "written", rotary: str = "none", bias: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim, self.way, self.product, self.rotary = 4, 8, way, product, rotary
        self.scale = self.head_dim**-0.5
        if way in ("packed", "by head"):
            self.qkv = nn.Linear(6, 96, bias=bias)
        else:
            few = 16 if way == "grouped" else 32
            self.q, self.k, self.v = (nn.Linear(6, n, bias=bias) for n in (32, few, few))
        self.proj = nn.Linear(32, 6)
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(4) / 4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.way == "packed":
            q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.way == "by head":
            split = self.qkv(x).view(n, t, self.heads, 3 * self.head_dim).transpose(1, 2)
            q, k, v = split.chunk(3, -1)
        else:
            q, k, v = (m(x).view(n, t, -1, self.head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.way == "grouped":
            k, v = (a[:, :, None].expand(n, 2, 2, t, self.head_dim).reshape(n, 4, t, -1) for a in (k, v))
        q, k = self._turned(q), self._turned(k)
        return self.proj(self._attended(q, k, v).transpose(1, 2).reshape(n, t, -1))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.product == "given":
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        if self.product == "by shape":
            return F.scaled_dot_product_attention(q, k, v)
        scale = 1 / math.sqrt(self.head_dim) if self.product == "computed" else self.scale
        return (q * scale @ k.transpose(-2, -1)).softmax(-1) @ v

    def _turned(self, x: Tensor) -> Tensor:
        if self.rotary == "none":
            return x
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.get_buffer("frequencies").to(x.dtype)
        if self.rotary == "halves":
            a, b = x.chunk(2, -1)
            angle = torch.cat((angle, angle), -1)
            return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()
        a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.stack(turned, -1).flatten(-2)


class Net(nn.Module):
    """A layer, attention with a residual connection, and the output."""

    def __init__(self, *what: Any, **options: Any) -> None:
        super().__init__()
        self.a, self.attn, self.out = nn.Linear(4, 6), Attention(*what, **options), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        return self.out(x + self.attn(x))


def net_of(*what: Any, **options: Any) -> tuple[pn.PlasticNet, Tensor]:
    x = torch.randn(3, 5, 4).double()
    return pn.PlasticNet(Net(*what, **options).double(), (x,), head_dims=("attn",)), x


def site_of(net: pn.PlasticNet) -> str:
    (name,) = [n for n in net.sites if n.startswith("attn.q")]
    return name


@pytest.mark.parametrize("rotary", ["none", "halves", "pairs"])
@pytest.mark.parametrize("product", ["written", "given"])
@pytest.mark.parametrize("way", WAYS)
def test_compact_equals_eval(way: str, product: str, rotary: str, tmp_path: Path) -> None:
    net, x = net_of(way, product, rotary)
    name = site_of(net)
    assert len(net.sites[name]) == (8 if rotary == "none" else 4)
    randomise_gates(net)
    for k in (3.0, math.inf):
        net.k = k
        net.eval()
        small: Any = net.compact()
        assert small.attn.heads == 4
        assert small.attn.head_dim < 8
        torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-9)
    net.prune(0.5)
    torch.testing.assert_close(net.compact()(x), net(x), rtol=0, atol=1e-9)
    pn.save(small, tmp_path / "small.safetensors")
    again = pn.load(tmp_path / "small.safetensors", lambda: Net(way, product, rotary).double())
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_new_dimensions_change_nothing(way: str) -> None:
    net, x = net_of(way)
    net.eval()
    wanted = net(x)
    net.grow({site_of(net): 2})
    assert net.model.get_submodule("attn").head_dim == 10
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("product", ["by shape", "computed"])
@pytest.mark.parametrize("way", ["separate", "packed"])
def test_a_scale_that_follows_the_size_is_frozen(way: str, product: str) -> None:
    net, _ = net_of(way, product)
    assert not [n for n in net.sites if n.startswith("attn.q")]
    (reason,) = {reason for n, reason in net.frozen.items() if n.startswith("attn.q")}
    assert "self.scale = head_dim ** -0.5, and give it as scale=self.scale" in reason


def test_for_multihead_attention_the_reason_says_to_leave_it_out() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__("packed")
            self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).tanh()
            return self.out(x + self.attn(x, x, x)[0])

    x = torch.randn(3, 5, 4)
    assert "without head_dims=" in pn.PlasticNet(Plain(), (x,), head_dims="attn").frozen["attn"]
    assert "attn" in pn.PlasticNet(Plain(), (x,)).sites


def test_without_it_heads_are_the_units() -> None:
    x = torch.randn(3, 5, 4)
    net = pn.PlasticNet(Net("packed"), (x,))
    assert len(net.sites["attn.qkv"]) == 4
    with pytest.raises(PlasticError, match=r"head_dims='attention' matches no module of Net"):
        pn.PlasticNet(Net("packed"), (x,), head_dims=("attention",))


def test_losses_have_slopes_and_a_budget_is_met() -> None:
    torch.manual_seed(0)
    net, x = net_of("packed", bias=False)
    name = site_of(net)
    net.k = 2.0
    net.train()
    net.expected_loss(lambda: net(x).square().mean((1, 2))).backward()
    slopes = net.sites[name].phi.grad
    assert slopes is not None
    assert bool(slopes.isfinite().all())
    assert bool(slopes.any())
    small, report = pn.shrink(
        Net("packed").double(), list(torch.randn(64, 5, 4).double().split(16)), pn.Budget(macs=0.6), head_dims=("attn",)
    )
    assert {change.name: change.after for change in report.sites}["attn.qkv"] < 8
    assert small.get_submodule("attn").heads == 4
