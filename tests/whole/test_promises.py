"""What a sceptical reader tried, each with what is promised."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import plasticnet as pn
from plasticnet.gates.norms import OpenStatistics
from plasticnet.layers.attention import free_heads


class Merging(nn.Linear):
    """A low-rank update that is merged into the weight when the mode changes."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__(features, out)
        self.a, self.b = nn.Parameter(torch.randn(2, features)), nn.Parameter(torch.randn(out, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        if mode == self.merged:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.T @ self.b.T


def test_attaching_changes_no_parameter() -> None:
    model = nn.Sequential(Merging(4, 8), nn.ReLU(), nn.Linear(8, 3))
    before = {n: p.clone() for n, p in model.named_parameters()}
    pn.PlasticNet(model, torch.randn(6, 4))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class OverTwo(nn.Module):
    """One norm over two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 6)
        self.norm, self.out = nn.LayerNorm(11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([self.a(x), self.b(x).tanh()], -1)))


def test_a_norm_over_two_sites_one_of_them_closed() -> None:
    """The one unit that stays counts in the statistics, before and after it is cut."""
    x = torch.randn(6, 4).double()
    net = pn.PlasticNet(OverTwo().double(), x, residual=True).eval()
    net.sites["a"].phi.data.copy_(torch.tensor([-1.0, -3.0, -0.5, -2.0, -1.0]))
    for k in (math.inf, 7.0):
        net.k = k
        assert (net.compact()(x) - net(x)).abs().max() <= 1e-12
    out = net(x)
    net.prune()
    assert len(net.sites["a"]) == 1
    assert (net(x) - out).abs().max() <= 1e-12
    assert (net.compact()(x) - out).abs().max() <= 1e-12


def test_reentrant_checkpointing_is_refused_where_it_would_be_wrong() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(lambda t: self.b(t).relu(), self.a(x).relu(), use_reentrant=True)
            return self.c(y)  # pyright: ignore

    net = pn.PlasticNet(Checkpointed(), torch.randn(4, 8)).train()
    net(torch.randn(4, 8)).sum().backward()  # everything is open
    net.sites["a"].phi.data[0] = -1.0
    with pytest.raises(pn.PlasticError, match="gradient checkpointing"):
        net(torch.randn(4, 8))
    with torch.no_grad():
        net(torch.randn(4, 8))
    assert checkpoint(torch.sin, torch.ones(2, requires_grad=True), use_reentrant=True).sum() > 0  # pyright: ignore


def test_a_padding_mask_in_torchs_encoder() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
            self.start, self.encoder, self.end = nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.end(self.encoder(self.start(x), src_key_padding_mask=mask))

    x, mask = torch.randn(2, 6, 5).double(), torch.arange(6).expand(2, 6) >= 4
    for residual in (False, True):
        net = pn.PlasticNet(Encoder().double(), x, residual=residual).eval()
        for site in net.sites.values():
            site.phi.data[0] = -1.0
        with torch.no_grad():
            assert (net(x, mask) - net.compact()(x, mask)).abs().max() <= 1e-12


def test_back_to_a_wider_state() -> None:
    """A site that cannot gain new units can get its old ones back."""
    x = torch.randn(6, 4).double()
    net = pn.PlasticNet(OverTwo().double(), x, residual=True).eval()
    net.sites["a"].phi.data[0] = -1.0
    state, out = {n: t.clone() for n, t in net.state_dict().items()}, net(x)
    net.prune()
    net.load_state_dict(state)
    assert torch.equal(net(x), out)
    assert not net.sites["a"].units.growable


@dataclass
class Extras:
    hidden: Tensor


def test_an_output_in_a_dataclass_is_an_output() -> None:
    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Extras]:
            hidden = self.a(x).relu()
            return self.c(self.b(hidden).relu()), Extras(hidden)

    net = pn.PlasticNet(Returning(), torch.randn(6, 4))
    assert set(net.sites) == {"b"}
    assert "output" in net.frozen["a"]


def test_masked_actions_are_no_reason_to_freeze() -> None:
    class Actor(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.masked_fill(torch.arange(y.shape[-1]) == 1, -math.inf)

    net = pn.PlasticNet(Actor(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4))
    assert set(net.sites) == {"0"}


def test_a_subclass_of_attention_keeps_its_forward() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Tensor, **kwargs: bool) -> tuple[Tensor, Tensor | None]:  # pyright: ignore
            return super().forward(*args, **kwargs)  # pyright: ignore

    module = Own(8, 4)
    module.in_proj_weight = nn.Parameter(module.in_proj_weight[:12])
    free_heads(module, 2)
    assert type(module) is Own


def test_a_block_of_another_kind_in_training() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = x + self.down(self.up(x).relu())
            return (y, y) if self.training else y

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.block, self.end = nn.Linear(4, 6), Block(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(self.start(x))
            return self.end(y[0] if isinstance(y, tuple) else y)

    net = pn.PlasticNet(Net(), torch.randn(5, 4), blocks=("block",))
    assert "depth" not in net.sites
    assert "in training" in net.frozen["block (as a block)"]


def test_blocks_that_share_a_parameter_stay() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    blocks = [Residual(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)) for _ in range(3)]
    blocks[1][0].weight = blocks[0][0].weight  # pyright: ignore
    x = torch.randn(5, 4).double()
    net = pn.PlasticNet(nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 3)).double(), x, blocks=("[123]",))
    assert net.sites["depth"].units.blocks == ("3",)  # pyright: ignore
    assert "shares a parameter" in net.frozen["1 (as a block)"]


def test_an_interrupt_leaves_no_mode_behind() -> None:
    class Interrupted(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            raise KeyboardInterrupt

    module = Interrupted(4)
    mask = torch.tensor([True, False, True, True])
    with pytest.raises(KeyboardInterrupt), OpenStatistics(module, -1, frozenset({"mean", "var"})).over(mask):
        module(torch.randn(2, 4))
    x = torch.randn(2, 4)
    assert torch.equal(F.layer_norm(x, (4,)), torch.layer_norm(x, (4,)))
    assert F.layer_norm(x, (4,)).mean().abs() < 1e-6


def test_a_mean_over_something_else_in_the_same_layer() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
            return x + x.transpose(1, 2).mean(-1).unsqueeze(1)

    model = nn.Sequential(nn.Linear(4, 8), Pooling(), nn.Linear(8, 6), nn.Linear(6, 3))
    net = pn.PlasticNet(model, torch.randn(2, 5, 4), residual=True)
    assert set(net.sites) == {"2"}
    assert "of something else" in net.frozen["0"]


def test_means_in_half_precision_do_not_overflow() -> None:
    module = nn.Identity()
    x = torch.full((1, 1024), 200.0, dtype=torch.float16)
    mask = torch.arange(1024) > 0
    with OpenStatistics(module, -1, frozenset({"mean"})).over(mask):
        module.forward = lambda t: t.pow(2).mean(-1)  # pyright: ignore
        assert module(x).item() == 40_000.0


def test_a_compact_swin_can_be_pickled() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    x = torch.randn(2, 3, 32, 32)
    net = pn.PlasticNet(swin.SwinTransformer([4, 4], 16, [2], [4], [4, 4], num_classes=3), x).eval()
    net.sites["features.1.0.attn.qkv"].phi.data[0] = -1.0
    small = net.compact()
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
