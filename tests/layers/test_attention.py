"""Attention with a free number of heads: equal to the modules that it stands in for, and cut with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.layers.attention import FreeMultiheadAttention, FreeWindowAttention, free_heads, head_size

WIDTH, HEADS, LENGTH, SOURCE, BATCH = 12, 3, 5, 4, 2


def attention(**options: Any) -> nn.MultiheadAttention:
    """In double precision, with biases that are not zero."""
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    for p in module.parameters():
        nn.init.normal_(p)
    return module


def free(module: nn.MultiheadAttention) -> FreeMultiheadAttention:
    twin = copy.deepcopy(module)
    twin.__class__ = FreeMultiheadAttention
    assert isinstance(twin, FreeMultiheadAttention)
    return twin


def qkv(module: nn.MultiheadAttention, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, in the layout of a module."""

    def tensor(length: int, width: int) -> Tensor:
        shape = (BATCH, length) if module.batch_first else (length, BATCH)
        return torch.randn(*(shape if batched else (length,)), width).double()

    return tensor(LENGTH, WIDTH), tensor(SOURCE, module.kdim), tensor(SOURCE, module.vdim)


def assert_equal(module: nn.MultiheadAttention, inputs: tuple[Tensor, ...], **options: Any) -> None:
    twin = free(module)
    expected, found = module(*inputs, **options), twin(*inputs, **options)
    assert found[0].shape == expected[0].shape
    assert (found[0] - expected[0]).abs().max() <= 1e-9
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        assert found[1].shape == expected[1].shape
        assert (found[1] - expected[1]).abs().max() <= 1e-9


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 5, "vdim": 7},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all": {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("options", MODULES.values(), ids=list(MODULES))
def test_equals_multihead_attention(options: dict[str, Any], batch_first: bool, batched: bool) -> None:
    module = attention(**options, batch_first=batch_first)
    inputs = qkv(module, batched)
    for weights in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        assert_equal(module, inputs, **weights)


def forbidden(*shape: int) -> Tensor:
    """A mask that leaves every query something to read."""
    mask = torch.rand(*shape) < 0.5
    mask[..., 0] = False
    return mask


MASKS: dict[str, Any] = {
    "2-D bool": lambda: {"attn_mask": forbidden(LENGTH, SOURCE)},
    "2-D float": lambda: {"attn_mask": torch.randn(LENGTH, SOURCE).double()},
    "3-D bool": lambda: {"attn_mask": forbidden(BATCH * HEADS, LENGTH, SOURCE)},
    "3-D float": lambda: {"attn_mask": torch.randn(BATCH * HEADS, LENGTH, SOURCE).double()},
    "padding bool": lambda: {"key_padding_mask": forbidden(BATCH, SOURCE)},
    "padding float": lambda: {"key_padding_mask": torch.randn(BATCH, SOURCE).double()},
    "both": lambda: {
        "attn_mask": forbidden(BATCH * HEADS, LENGTH, SOURCE),
        "key_padding_mask": forbidden(BATCH, SOURCE),
    },
}


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["", "extra keys"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=list(MASKS))
def test_masks(masks: Any, extra: dict[str, Any]) -> None:
    module = attention(batch_first=True, **extra)
    inputs, options = qkv(module), masks()
    for need_weights in (True, False):
        assert_equal(module, inputs, need_weights=need_weights, **options)
    moved = free(module)(*inputs, **options)[0] - free(module)(*inputs)[0]
    assert moved.abs().max() > 1e-3  # the masks are not ignored


def test_unbatched_masks_and_the_causal_hint() -> None:
    module = attention()
    x = torch.randn(LENGTH, WIDTH).double()
    assert_equal(module, (x, x, x), attn_mask=forbidden(HEADS, LENGTH, LENGTH))
    assert_equal(module, (x, x, x), key_padding_mask=torch.tensor([False, False, True, True, False]))
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    for need_weights in (True, False):
        assert_equal(module, (x, x, x), attn_mask=causal, is_causal=True, need_weights=need_weights)


def test_dropout_acts_in_training_only() -> None:
    module = attention(dropout=0.5)
    twin, inputs = free(module), qkv(module)
    assert_equal(module.eval(), inputs)
    torch.manual_seed(1)
    expected = module.train()(*inputs)
    torch.manual_seed(1)
    found = twin(*inputs)
    assert (found[0] - expected[0]).abs().max() <= 1e-9
    assert not torch.equal(twin(*inputs)[0], found[0])
    assert not torch.equal(twin(*inputs, need_weights=False)[0], twin(*inputs, need_weights=False)[0])


# -- windows ----------------------------------------------------------------------------------

WINDOWS = {  # (height, width) of the map, window, shift
    "no shift": ((4, 6), [2, 3], [0, 0]),
    "shift": ((6, 8), [3, 4], [1, 2]),
    "shift along one axis": ((6, 8), [3, 4], [0, 2]),
    "padding": ((5, 7), [3, 4], [0, 0]),
    "padding and shift": ((5, 7), [3, 4], [1, 2]),
    "window larger than the map": ((3, 2), [4, 4], [2, 2]),
    "larger along one axis": ((3, 9), [4, 4], [2, 2]),
}


def window_attention(version: int, window: list[int], shift: list[int], **options: Any) -> nn.Module:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    kind = {1: swin.ShiftedWindowAttention, 2: swin.ShiftedWindowAttentionV2}[version]
    module = kind(WIDTH, window, shift, HEADS, **options).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


@pytest.mark.parametrize("case", WINDOWS.values(), ids=list(WINDOWS))
@pytest.mark.parametrize("version", [1, 2])
def test_equals_window_attention(version: int, case: tuple[tuple[int, int], list[int], list[int]]) -> None:
    size, window, shift = case
    x = torch.randn(2, *size, WIDTH).double()
    for bias in (True, False) if version == 1 else (True,):  # torchvision's V2 does not run without a bias
        module = window_attention(version, window, shift, qkv_bias=bias)
        expected = module(x)
        free_heads(module, WIDTH // HEADS)
        assert not isinstance(module, FreeWindowAttention)
        own = type(module)
        module.__class__ = type("Free", (FreeWindowAttention, own), {})
        found = module(x)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
        assert found.is_contiguous()


@pytest.mark.parametrize("version", [1, 2])
def test_window_dropouts(version: int) -> None:
    module = window_attention(version, [2, 2], [0, 0], attention_dropout=0.5, dropout=0.5)
    x = torch.randn(1, 4, 4, WIDTH).double()
    expected = module.eval()(x)
    free_heads(module, WIDTH // HEADS)
    module.__class__ = type("Free", (FreeWindowAttention, type(module)), {})
    assert (module(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    module.train()
    assert not torch.equal(module(x), module(x))


# -- cut modules ------------------------------------------------------------------------------


def cut_heads(module: Any, keep: list[int]) -> None:
    """Cut a packed attention to these heads, by hand."""
    size = head_size(module)
    assert size is not None
    rows = torch.cat([torch.arange(h * size, (h + 1) * size) for h in keep])
    out = module.out_proj if isinstance(module, nn.MultiheadAttention) else module.proj
    if isinstance(module, nn.MultiheadAttention):
        packed = torch.cat([rows + i * WIDTH for i in range(3)])
        module.in_proj_weight = nn.Parameter(module.in_proj_weight[packed])
        module.in_proj_bias = nn.Parameter(module.in_proj_bias[packed])
    else:
        packed = torch.cat([rows + i * WIDTH for i in range(3)])
        module.qkv.weight, module.qkv.bias = (nn.Parameter(t[packed]) for t in (module.qkv.weight, module.qkv.bias))
    out.weight = nn.Parameter(out.weight[:, rows])
    free_heads(module, size)


def test_free_heads_of_a_cut_module() -> None:
    module = attention(batch_first=True)
    masked = copy.deepcopy(module)
    with torch.no_grad():
        masked.out_proj.weight[:, 4:8] = 0.0
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    cut_heads(module, [0, 2])
    assert isinstance(module, FreeMultiheadAttention)
    assert (module.num_heads, module.head_dim, module.embed_dim) == (2, 4, WIDTH)
    assert (head_size(module), module.in_proj_weight.shape) == (4, (24, WIDTH))
    out, weights = module(x, x, x, average_attn_weights=False)
    assert weights.shape == (BATCH, 2, LENGTH, LENGTH)
    assert (out - masked(x, x, x)[0]).abs().max() <= 1e-9
    twin = copy.deepcopy(module)
    assert type(twin) is FreeMultiheadAttention
    assert torch.equal(twin(x, x, x)[0], out)
    assert twin.in_proj_weight is not module.in_proj_weight


@pytest.mark.parametrize("version", [1, 2])
def test_free_heads_of_a_cut_window_attention(version: int) -> None:
    module: Any = window_attention(version, [2, 2], [1, 1])
    x = torch.randn(2, 4, 4, WIDTH).double()
    masked = copy.deepcopy(module)
    with torch.no_grad():
        masked.proj.weight[:, 4:8] = 0.0
    if version == 1:  # the bias has a column for each head
        module.relative_position_bias_table = nn.Parameter(module.relative_position_bias_table[:, [0, 2]])
    else:
        module.cpb_mlp[-1].weight = nn.Parameter(module.cpb_mlp[-1].weight[[0, 2]])
        module.logit_scale = nn.Parameter(module.logit_scale[[0, 2]])
    cut_heads(module, [0, 2])
    assert isinstance(module, FreeWindowAttention)
    assert (module.num_heads, module.head_dim) == (2, 4)
    out, expected = module(x), masked(x)
    assert (out - expected).abs().max() <= 1e-9 * expected.abs().max()
    twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    assert torch.equal(twin(x), out)


def test_nothing_changes_while_sizes_fit() -> None:
    module = attention()
    free_heads(module, WIDTH // HEADS)
    assert type(module) is nn.MultiheadAttention
    assert (module.num_heads, module.head_dim, module.kdim, module.vdim) == (HEADS, 4, WIDTH, WIDTH)
    assert head_size(nn.Linear(3, 3)) is None


# -- in a network -----------------------------------------------------------------------------


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that torch runs an encoder layer as one fused operation."""
    calls: list[int] = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fused(*a))
    return calls


def test_the_fused_encoder_layer_is_left_aside_once_heads_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch takes it for an even number of heads only, so that 2 of 4 are cut."""
    calls = fused_calls(monkeypatch)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 10, batch_first=True)
    x = torch.randn(BATCH, LENGTH, 4).double()
    net = pn.PlasticNet(nn.Sequential(nn.Linear(4, WIDTH), layer, nn.Linear(WIDTH, 3)).double(), (x,))
    assert len(net.sites["1.self_attn"]) == 4
    net.eval()
    with torch.no_grad():
        calls.clear()
        whole = net(x)
        assert calls == [1]  # else what follows could not fail
        net.sites["1.self_attn"].phi[[0, 3]] = -1.0
        small = net.compact()
        assert isinstance(small[1].self_attn, FreeMultiheadAttention)
        assert small[1].self_attn.num_heads == 2
        calls.clear()
        out = small(x)
        assert torch.equal(copy.deepcopy(small)(x), out)
        assert calls == []
        for module in net.model.modules():  # the reference: masked by hand, without fusing
            module.register_forward_pre_hook(lambda *_: None)
        masked = net(x)
        assert calls == []
        assert (out - masked).abs().max() <= 1e-9
        assert (masked - whole).abs().max() > 1e-3
    net.prune()
    assert net.model[1].self_attn.num_heads == 2
    assert (copy.deepcopy(net)(x) - masked).abs().max() <= 1e-9


def test_gates_act_in_the_fused_encoder_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where units are closed, torch does not fuse the layer that holds them."""
    calls = fused_calls(monkeypatch)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 10, batch_first=True)
    x = torch.randn(BATCH, LENGTH, 4).double()
    net = pn.PlasticNet(nn.Sequential(nn.Linear(4, WIDTH), layer, nn.Linear(WIDTH, 3)).double(), (x,))
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[1] = -1.0
    plain = net.eval()(x)
    with torch.no_grad():
        calls.clear()
        assert (net(x) - plain).abs().max() <= 1e-9
        assert calls == []  # so that hooks and masks are not passed by
        assert (net.compact()(x) - plain).abs().max() <= 1e-9


def test_maxvit_heads_are_exact() -> None:
    maxvit = pytest.importorskip("torchvision.models.maxvit")
    model = maxvit.MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[16], block_layers=[1], head_dim=4,
        stochastic_depth_prob=0.0, num_classes=3,
    ).double()  # fmt: skip
    x = torch.randn(2, 3, 32, 32).double()
    net = pn.PlasticNet(model, (x,))
    heads = [n for n in net.sites if n.endswith("to_qkv")]
    assert [len(net.sites[n]) for n in heads] == [4, 4]
    for name in heads:
        net.sites[name].phi.data[:3] = -1.0
    masked = net.eval()(x)
    small = net.compact()
    assert (small(x) - masked).abs().max() <= 1e-9 * masked.abs().max()
    assert small.get_submodule(heads[0].rpartition(".")[0]).n_heads == 1
