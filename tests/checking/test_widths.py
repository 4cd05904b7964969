"""Attributes that must follow a site's size: found by value, checked by running, kept by all that resizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.units import Width
from tests.kit.networks import assert_same, randomise_gates

WIDTH, HEADS, SIZE, LENGTH = 12, 4, 3, 5


class Attention(nn.Module):
    """With a number of heads that forward reads."""

    def __init__(self, heads: int = HEADS, size: int = SIZE) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * heads * size), nn.Linear(heads * size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, t, -1))


class Splitting(Attention):
    """As in GPT-2: the width of all heads is an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.split_size = HEADS * SIZE

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.view(*t.shape[:2], -1, self.head_dim).transpose(1, 2) for t in self.qkv(x).split(self.split_size, 2)
        )
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tupled(Attention):
    """A tuple of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (3, HEADS, SIZE)
        del self.num_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, self.sizes).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Separate(Attention):
    """As in Llama: keys and values have a number of heads of their own, here that of the queries.

    Args:
        written: Whether the size of a head is written where heads are split, and not found by torch.
    """

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.num_key_heads, self.size = HEADS, SIZE if written else -1
        self.qkv = nn.Linear(WIDTH, HEADS * SIZE)
        self.k, self.v = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(WIDTH, HEADS * SIZE)
        self.register_buffer("turned", torch.randn(LENGTH, SIZE))

    def split(self, x: Tensor, heads: int) -> Tensor:
        return (x.view(*x.shape[:2], heads, self.size).transpose(1, 2) * self.turned).sin()

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(self.qkv(x), self.num_heads)
        k, v = self.split(self.k(x), self.num_key_heads), self.split(self.v(x), self.num_key_heads)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class HardCoded(Attention):
    """Divides the width that comes in, which is not the width of the heads that are left."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, t, -1))


class Network(nn.Module):
    """Attention with what it adds to frozen, so that heads are the only units in it."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(attentions)
        self.up, self.down = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x + self.down(self.up(x).tanh())


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    # attributes, and what they are with two heads
    "num_heads": (Attention, {"num_heads": 4, "head_dim": 3}, {"num_heads": 2, "head_dim": 3}),
    "split_size": (Splitting, {"split_size": 12, "head_dim": 3}, {"split_size": 6, "head_dim": 3}),
    "tuple": (Tupled, {"sizes": (3, 4, 3)}, {"sizes": (3, 2, 3)}),
    "two that stop in the same words": (
        lambda: Separate(False), {"num_heads": 4, "num_key_heads": 4}, {"num_heads": 2, "num_key_heads": 2},
    ),
    "the same, with the size of a head": (
        lambda: Separate(True), {"num_heads": 4, "num_key_heads": 4}, {"num_heads": 2, "num_key_heads": 2},
    ),
    "equal by chance": (
        lambda: Attention(3, 3), {"num_heads": 3, "head_dim": 3}, {"num_heads": 2, "head_dim": 3},
    ),
    "all equal": (
        lambda: Attention(WIDTH // 2, 2), {"num_heads": 6, "head_dim": 2}, {"num_heads": 2, "head_dim": 2},
    ),
}  # fmt: skip


def network(name: str) -> nn.Module:
    return Network(CASES[name][0](), CASES[name][0]()).double()


def tokens() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH).double()


def attributes(model: nn.Module, names: Any) -> list[dict[str, Any]]:
    return [{n: getattr(layer, n) for n in names} for layer in model.layers]  # pyright: ignore


def two_heads(net: pn.PlasticNet) -> None:
    """Close all heads but the second and the last."""
    with torch.no_grad():
        for name, site in net.sites.items():
            if "qkv" in name:
                site.phi.fill_(-1.0)
                site.phi[[1, -1]] = 0.3


@pytest.mark.parametrize("name", CASES)
def test_attributes_follow(name: str, tmp_path: Path) -> None:
    _, whole, half = CASES[name]
    x = tokens()
    net = pn.PlasticNet(network(name), x)
    heads = next(iter(whole.values())) if "num_heads" in whole else HEADS
    assert {n: len(s) for n, s in net.sites.items()} == {"layers.0.qkv": heads, "layers.1.qkv": heads, "up": 5}
    two_heads(net)
    masked = net.eval()(x)
    small = net.compact()
    assert attributes(small, whole) == [half, half]
    assert attributes(net.model, whole) == [whole, whole]
    assert (small(x) - masked).abs().max() <= 1e-9

    pn.save(small, tmp_path / "a.safetensors")
    back = pn.load(tmp_path / "a.safetensors", lambda: network(name))
    assert attributes(back, whole) == [half, half]
    assert_same(back.state_dict(), small.state_dict())
    assert (back(x) - small(x)).abs().max() <= 1e-12

    net.prune()
    assert attributes(net.model, whole) == [half, half]
    assert (net(x) - masked).abs().max() <= 1e-9
    net.grow({"layers.1.qkv": heads - 2})
    assert attributes(net.model, whole) == [half, whole]
    assert (net(x) - masked).abs().max() <= 1e-9  # new heads start without effect

    fresh = pn.PlasticNet(network(name), x)
    fresh.load_state_dict(net.state_dict())
    assert attributes(fresh.model, whole) == [half, whole]
    assert (fresh.eval()(x) - masked).abs().max() <= 1e-9
    fresh.resize({"layers.0.qkv": [1, -1], "layers.1.qkv": [0]})
    randomise_gates(fresh)
    assert (fresh.compact()(x) - fresh.eval()(x)).abs().max() <= 1e-9


def test_only_what_forward_reads_follows() -> None:
    """``head_dim`` equals the number of heads, and so does an attribute that nothing reads."""
    model = Network(Attention(3, 3)).double()
    model.layers[0].never_read = 3
    net = pn.PlasticNet(model, tokens())
    assert net.sites["layers.0.qkv"].units.widths == (Width("layers.0", "num_heads", 1),)
    net.resize({"layers.0.qkv": [0, 2]})
    assert (model.layers[0].head_dim, model.layers[0].never_read) == (3, 3)


def test_nothing_follows_where_nothing_has_to() -> None:
    class Inferring(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).flatten(2))

    net = pn.PlasticNet(Network(Inferring()).double(), tokens())
    assert len(net.sites["layers.0.qkv"]) == HEADS
    assert net.sites["layers.0.qkv"].units.widths == ()


def test_a_forward_that_divides_its_input_stays_frozen() -> None:
    model = Network(HardCoded()).double()
    model.down = nn.Sequential(nn.Linear(5, WIDTH), Attention()).double()
    net = pn.PlasticNet(model, tokens())
    assert {n: len(s) for n, s in net.sites.items()} == {"up": 5, "down.0": WIDTH, "down.1.qkv": HEADS}
    assert "does not run when units are cut" in net.frozen["layers.0.qkv"]
    assert model.layers[0].num_heads == HEADS  # what was tried was tried on a copy


class Biased(Attention):
    """As in T5: the first layer computes a bias for all heads, which it hands to the others."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.bias = nn.Embedding(LENGTH, HEADS) if first else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:  # pyright: ignore
        b, t, _ = x.shape
        if self.bias is not None:
            steps = torch.arange(t, device=x.device)
            bias = self.bias((steps[:, None] - steps).abs()).permute(2, 0, 1)
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, t, -1)), bias  # pyright: ignore


class Handing(Network):
    def __init__(self) -> None:
        super().__init__(Biased(True), Biased(False), Biased(False))

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            y, bias = layer(x, bias)
            x = x + y
        return x + self.down(self.up(x).tanh())


class Zeros(Handing):
    """The first layer's bias is zeros of a number of heads that it reads: nothing in the trace ties the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].bias = None

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.layers[0]
        bias = x.new_zeros(first.num_heads, 1, 1)
        for layer in self.layers:
            x = x + layer(x, bias)[0]
        return x + self.down(self.up(x).tanh())


@pytest.mark.parametrize(("make", "residual"), [(Handing, True), (Zeros, False)], ids=["embedding", "zeros"])
def test_layers_that_share_a_bias_are_one_site(make: Callable[[], nn.Module], residual: bool, tmp_path: Path) -> None:
    x = tokens()
    net = pn.PlasticNet(make().double(), x, residual=residual)
    (name,) = set(net.sites) - {"up"}
    site = net.sites[name]
    assert len(site) == HEADS
    owned = {s.tensor for s in site.units.slices}
    assert {f"layers.{i}.{leaf}.weight" for i in range(3) for leaf in ("qkv", "proj")} <= owned
    with torch.no_grad():
        site.phi[[0, 2]] = -1.0
    masked, small = net.eval()(x), net.compact()
    assert attributes(small, ["num_heads"]) == [{"num_heads": 2}] * 3
    assert (small(x) - masked).abs().max() <= 1e-9
    pn.save(small, tmp_path / "a.safetensors")
    back = pn.load(tmp_path / "a.safetensors", lambda: make().double())
    assert (back(x) - small(x)).abs().max() <= 1e-12
    net.prune()
    net.grow({name: 1})
    assert attributes(net.model, ["num_heads"]) == [{"num_heads": 3}] * 3
    assert (net(x) - masked).abs().max() <= 1e-9
    net.k = 2.0
    net.train()
    net.expected_loss(lambda: net(x).pow(2).sum((1, 2))).backward()
    assert site.phi.grad is not None


def test_a_file_may_set_no_other_attribute(tmp_path: Path) -> None:
    net = pn.PlasticNet(network("num_heads"), tokens())
    two_heads(net)
    pn.save(net.compact(), tmp_path / "a.safetensors")

    def without() -> nn.Module:
        model = network("num_heads")
        for layer in model.layers:  # pyright: ignore
            layer.num_heads = "four"
        return model

    with pytest.raises(pn.PlasticError, match=r"may not set layers\.0\.num_heads"):
        pn.load(tmp_path / "a.safetensors", without)


def test_sizes_beside_the_layer(tmp_path: Path) -> None:
    """``nn.Unflatten`` has no parameters, and its sizes follow the layer before it."""

    def make() -> nn.Module:
        body = [nn.Linear(5, 36), nn.ReLU(), nn.Unflatten(1, (4, 3, 3)), nn.Conv2d(4, 6, 3), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(6, 2)).double()

    x = torch.randn(3, 5).double()
    net = pn.PlasticNet(make(), x)
    assert len(net.sites["0"]) == 4
    net.sites["0"].phi.data[1] = -1.0
    small = net.compact()
    assert small[2].unflattened_size == (3, 3, 3)  # pyright: ignore
    assert (small(x) - net.eval()(x)).abs().max() <= 1e-12
    pn.save(small, tmp_path / "small.safetensors")
    assert torch.equal(pn.load(tmp_path / "small.safetensors", make)(x), small(x))
    net.grow({"0": 2})
    assert net.model[2].unflattened_size == (6, 3, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_four_attributes_follow_the_heads_of_mamba_2(groups: int) -> None:
    """Its splits, its convolution, its heads and its gated norm each have a number of their own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=20, hidden_size=16, state_size=3, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=groups,
        chunk_size=4, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config).double()
    net = pn.PlasticNet(model, (torch.randint(20, (2, 9)),), residual=True, outputs=lambda out: out.logits).eval()
    site = net.sites["backbone.layers.0.mixer.in_proj"]
    assert len(site) == 4 // groups  # a group loses all its heads or none
    assert {w.attribute for w in site.units.widths} >= {"num_heads", "intermediate_size", "conv_dim"}
    for _ in range(3):
        randomise_gates(net)
        tokens = torch.randint(20, (2, 11))
        # Its norm computes in single precision.
        torch.testing.assert_close(net.compact()(tokens).logits, net(tokens).logits, rtol=1e-5, atol=1e-6)


class Weighed(nn.Module):
    """A layer whose heads weigh their own channels, as in a graph attention network."""

    def __init__(self, inputs: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.lin, self.att = nn.Linear(inputs, heads * size), nn.Parameter(torch.randn(1, heads, size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x).view(-1, self.heads, self.size)
        return (x * (x * self.att).sum(-1, keepdim=True).sigmoid()).reshape(len(x), -1)


class LastHasOneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs, self.out = nn.ModuleList([Weighed(6, 4, 5), Weighed(20, 1, 7)]), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return self.out(x)


def test_layers_of_a_stack_may_follow_different_attributes() -> None:
    """Of the first layer whole heads are units, and of the last one, which has a single head, its channels."""
    torch.manual_seed(0)
    net = pn.PlasticNet(LastHasOneHead().double(), (torch.randn(5, 6).double(),)).eval()
    follow = {n: (len(s), {w.attribute for w in s.units.widths}) for n, s in net.sites.items()}
    assert follow == {"convs.0.lin": (4, {"heads"}), "convs.1.lin": (7, {"size"})}
    for _ in range(4):
        randomise_gates(net)
        x = torch.randn(5, 6).double()
        torch.testing.assert_close(net.compact()(x), net(x), rtol=0, atol=1e-9)
