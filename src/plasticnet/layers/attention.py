"""Attention whose number of heads is free.

The forward of ``nn.MultiheadAttention`` and of torchvision's Swin and MaxViT takes the size of a head to be
width / heads, which no longer holds once heads or residual channels are gone. `free_heads` gives
such a module, when its sizes stop fitting, a forward that takes the size of a head from
``head_dim``; the parameters, their names and what the module computes stay what they were.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet.tools.torch_private import unfuse_attention


class FreeMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with ``num_heads`` heads of ``head_dim``, whatever the width is."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002  (a hint: attn_mask says the same)
    ) -> tuple[Tensor, Tensor | None]:
        """As in ``nn.MultiheadAttention``: (L, N, E), (N, L, E) with ``batch_first``, or (L, E)."""
        batched = query.dim() == 3
        q, k, v = (self._batch_first(t, batched) for t in (query, key, value))
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, k, v), weights, biases, strict=True))
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
            extra += 1
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(len(t), 1, t.shape[-1])], 1) for t in (k, v))
            extra += 1
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        bias = self._bias(q, attn_mask, key_padding_mask, extra)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weight = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
            out = weight @ v
        else:
            weight, out = None, F.scaled_dot_product_attention(q, k, v, bias, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weight is not None:
            weight = weight.mean(1) if average_attn_weights else weight
            weight = weight if batched else weight[0]
        if not batched:
            return out[0], weight
        return (out if self.batch_first else out.transpose(0, 1)), weight

    def _batch_first(self, t: Tensor, batched: bool) -> Tensor:
        if not batched:
            return t.unsqueeze(0)
        return t if self.batch_first else t.transpose(0, 1)

    def _bias(self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None, extra: int) -> Tensor | None:
        """Both masks as one that is added to the scores: (N or 1, heads or 1, L or 1, S)."""
        bias = None
        if attn_mask is not None:
            bias = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask
            bias = F.pad(_additive(bias, q.dtype), (0, extra))
        if padding is not None:
            padding = F.pad(_additive(padding, q.dtype), (0, extra)).view(len(q), 1, 1, -1)
            bias = padding if bias is None else bias + padding
        return bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is true where attention is forbidden, as a term of the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


class FreeWindowAttention(nn.Module):
    """The shifted window attention of torchvision's Swin (V1 and V2) with ``num_heads`` heads of
    ``head_dim``. It never stands alone: `free_heads` mixes it into the module's own class."""

    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    head_dim: int
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    get_relative_position_bias: Callable[[], Tensor]  # (1, heads, tokens, tokens): of the module's own class

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, channels) to the same."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        padded = x.shape[1:3]
        shift = [0 if w >= n else s for s, w, n in zip(self.shift_size, self.window_size, padded, strict=True)]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        x = self._attend(_windows(x, self.window_size), padded, shift)
        x = _unwindow(F.dropout(x, self.dropout, self.training), padded, self.window_size)
        if any(shift):
            x = x.roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _attend(self, x: Tensor, padded: torch.Size, shift: list[int]) -> Tensor:
        """Attention within windows, (batch, windows, tokens, channels) to the same."""
        bias, scale = self.qkv.bias, getattr(self, "logit_scale", None)
        if scale is not None and bias is not None:  # V2: keys have no bias
            q_bias, k_bias, v_bias = bias.chunk(3)
            bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
        if scale is None:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * scale.clamp(max=math.log(100.0)).exp()
        scores = scores + self.get_relative_position_bias()
        if any(shift):
            scores = scores + self._mask(scores, padded, shift)
        weight = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        return self.proj((weight @ v).transpose(2, 3).flatten(3))

    def _mask(self, scores: Tensor, padded: torch.Size, shift: list[int]) -> Tensor:
        """-100 between tokens that the roll brought together, (1, windows, 1, tokens, tokens)."""
        region = scores.new_zeros(padded)
        bounds = [(0, n - w, n - s, n) for n, w, s in zip(padded, self.window_size, shift, strict=True)]
        for i in range(3):
            for j in range(3):
                region[bounds[0][i] : bounds[0][i + 1], bounds[1][j] : bounds[1][j + 1]] = 3 * i + j
        label = _windows(region[None, :, :, None], self.window_size).squeeze(-1)
        apart = label.unsqueeze(-1) != label.unsqueeze(-2)
        return torch.zeros_like(apart, dtype=scores.dtype).masked_fill(apart, -100.0).unsqueeze(2)


def _windows(x: Tensor, size: list[int]) -> Tensor:
    """(batch, height, width, channels) to (batch, windows, tokens, channels)."""
    x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _unwindow(x: Tensor, padded: torch.Size, size: list[int]) -> Tensor:
    x = x.unflatten(2, (size[0], size[1])).unflatten(1, (padded[0] // size[0], padded[1] // size[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class FreeGridAttention(nn.Module):
    """The attention of torchvision's MaxViT with ``n_heads`` heads. Mixed in as `FreeWindowAttention` is."""

    n_heads: int
    head_dim: int
    scale_factor: float
    to_qkv: nn.Linear
    merge: nn.Linear
    get_relative_positional_bias: Callable[[], Tensor]  # (1, heads, tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, windows, tokens, channels) to the same."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))


@dataclass(frozen=True)
class _Known:
    """An attention of another library: the forward that takes its place, and what it calls its parts."""

    free: type[nn.Module]
    qkv: str
    heads: str


# By name, so that torchvision need not be there.
_KNOWN = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): _Known(FreeWindowAttention, "qkv", "num_heads"),
    ("torchvision.models.maxvit", "RelativePositionalMultiHeadAttention"): _Known(
        FreeGridAttention, "to_qkv", "n_heads"
    ),
}


def _known(module: nn.Module) -> _Known | None:
    names = ((c.__module__, c.__name__) for c in type(module).__mro__)
    return next((_KNOWN[name] for name in names if name in _KNOWN), None)


def head_size(module: nn.Module) -> int | None:
    """The size of one head of an attention module that `free_heads` knows, else None."""
    if isinstance(module, nn.MultiheadAttention):
        return module.head_dim
    known = _known(module)
    if known is None:
        return None
    return getattr(module, "head_dim", None) or getattr(module, known.qkv).out_features // 3 // getattr(
        module, known.heads
    )


def _projected(module: nn.MultiheadAttention) -> tuple[int, int]:
    weight: Tensor = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    return weight.shape[1], weight.shape[0] // (1 if module.in_proj_weight is None else 3)


def free_heads(module: nn.Module, size: int) -> None:
    """Bring an attention module whose heads have ``size`` up to date with its parameters."""
    if isinstance(module, nn.MultiheadAttention):
        width, heads_width = _projected(module)
        module.num_heads, module.head_dim, module.embed_dim = heads_width // size, size, width
        separate = module.in_proj_weight is None
        module.kdim = module.k_proj_weight.shape[1] if separate else width
        module.vdim = module.v_proj_weight.shape[1] if separate else width
        if width != heads_width and not isinstance(module, FreeMultiheadAttention):
            if type(module).forward is not nn.MultiheadAttention.forward:
                return  # a forward of its own, which must cope by itself
            own = type(module)
            free: Any = FreeMultiheadAttention if own is nn.MultiheadAttention else _mixed(FreeMultiheadAttention, own)
            module.__class__ = free
            unfuse_attention(module)
        return
    known = _known(module)
    if known is None:
        return
    tripled, width = getattr(module, known.qkv).weight.shape
    setattr(module, known.heads, tripled // 3 // size)
    module.__dict__["head_dim"] = size
    if tripled != 3 * width and not isinstance(module, known.free):
        module.__class__ = _mixed(known.free, type(module))


@contextmanager
def unfused_layers() -> Iterator[None]:
    """Within this context torch's encoder layers do without their fused forward, which knows neither of
    hooks nor of missing heads."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def unfuse_encoders(model: nn.Module) -> None:
    """Keep torch's encoders from nested tensors, which only their fused forward can read."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


@cache
def _mixed(free: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    return type(f"Free{own.__name__}", (free, own), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """The classes that `free_heads` makes, for pickle."""
    for (module, own), known in _KNOWN.items():
        if name == f"Free{own}V2" or name == f"Free{own}":
            return _mixed(known.free, getattr(importlib.import_module(module), name.removeprefix("Free")))
    raise AttributeError(name)
