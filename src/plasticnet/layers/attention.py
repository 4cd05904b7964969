"""Attention with any number of heads.

The forward of ``nn.MultiheadAttention``, and of the attention in torchvision's Swin and MaxViT, computes the size of a
head as width / heads. This is wrong once heads or residual channels are gone. When the sizes of such a module stop
fitting, `free_heads` gives it a forward that reads the size of a head from ``head_dim``. The parameters, their names
and what the module computes stay the same.
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
    """``nn.MultiheadAttention`` with ``num_heads`` heads of size ``head_dim``, whose product need not be the width.

    A resize or `PlasticNet.compact` turns a module into one of this class when it loses heads or channels. The
    parameters keep their names. The constructor is that of ``nn.MultiheadAttention``, and users need not call it.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.TransformerEncoderLayer(8, nhead=4, dim_feedforward=16, batch_first=True)
        >>> net = pn.PlasticNet(model, (torch.randn(2, 5, 8),))
        >>> net.resize({"self_attn": [0, 3]})
        >>> attention = net.compact().self_attn
        >>> type(attention).__name__, attention.num_heads, attention.head_dim, attention.embed_dim
        ('FreeMultiheadAttention', 2, 2, 8)
    """

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
        """Attend as ``nn.MultiheadAttention`` does, with the same arguments.

        Args:
            query: Shape (L, N, E), (N, L, E) with ``batch_first``, or (L, E) without a batch.
            key: The same with S in the place of L.
            value: As ``key``.
            key_padding_mask: Shape (N, S) or (S,): true, or a number added to the scores, where a key is to be ignored.
            need_weights: Whether the attention weights are returned, too.
            attn_mask: Shape (L, S) or (N * heads, L, S): true, or a number added to the scores, where attention is
                forbidden.
            average_attn_weights: Whether the returned weights are averaged over the heads.
            is_causal: A hint that ``attn_mask`` is causal. It changes nothing, because the mask is applied in any case.

        Returns:
            The output in the layout of ``query``, and the weights or None. The weights have shape (N, L, S), or (N,
            heads, L, S) if they are not averaged, and no first dimension without a batch.
        """
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
        """Return a tensor of inputs in shape (N, L, E)."""
        if not batched:
            return t.unsqueeze(0)
        return t if self.batch_first else t.transpose(0, 1)

    def _bias(self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None, extra: int) -> Tensor | None:
        """Return both masks as one that is added to the scores, shape (N or 1, heads or 1, L or 1, S), or None.

        Args:
            q: The queries, shape (N, heads, L, head_dim).
            attn_mask: As in `forward`.
            padding: The ``key_padding_mask`` of `forward`.
            extra: By how many positions the keys are longer than the masks.
        """
        bias = None
        if attn_mask is not None:
            bias = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask
            bias = F.pad(_additive(bias, q.dtype), (0, extra))
        if padding is not None:
            padding = F.pad(_additive(padding, q.dtype), (0, extra)).view(len(q), 1, 1, -1)
            bias = padding if bias is None else bias + padding
        return bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is true where attention is forbidden as a term of the scores; other masks are one already."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


class FreeWindowAttention(nn.Module):
    """The shifted window attention of torchvision's Swin (V1 and V2) with ``num_heads`` heads of size ``head_dim``.

    The product of both need not be the width. This class is never constructed on its own: a resize or
    `PlasticNet.compact` mixes it into the class of a torchvision module that loses heads or channels.

    Example:
        >>> import torch, plasticnet as pn
        >>> from torchvision.models.swin_transformer import ShiftedWindowAttention
        >>> model = ShiftedWindowAttention(8, window_size=[2, 2], shift_size=[0, 0], num_heads=4)
        >>> net = pn.PlasticNet(model, (torch.randn(2, 4, 4, 8),))
        >>> net.resize({"qkv": [0, 3]})
        >>> small = net.compact()
        >>> isinstance(small, pn.FreeWindowAttention), small.num_heads, small.head_dim
        (True, 2, 2)
    """

    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    head_dim: int
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    get_relative_position_bias: Callable[[], Tensor]  # shape (1, heads, tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within shifted windows; inputs and outputs have shape (batch, height, width, channels)."""
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
        """Attend within windows; inputs and outputs have shape (batch, windows, tokens, channels).

        Args:
            x: The inputs.
            padded: Height and width of the padded image.
            shift: By how much the image was shifted along both.
        """
        bias, scale = self.qkv.bias, getattr(self, "logit_scale", None)
        if scale is not None and bias is not None:  # The keys of Swin V2 have no bias.
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
        """Return -100 between tokens that only the shift has joined, shape (1, windows, 1, tokens, tokens)."""
        region = scores.new_zeros(padded)
        bounds = [(0, n - w, n - s, n) for n, w, s in zip(padded, self.window_size, shift, strict=True)]
        for i in range(3):
            for j in range(3):
                region[bounds[0][i] : bounds[0][i + 1], bounds[1][j] : bounds[1][j + 1]] = 3 * i + j
        label = _windows(region[None, :, :, None], self.window_size).squeeze(-1)
        apart = label.unsqueeze(-1) != label.unsqueeze(-2)
        return torch.zeros_like(apart, dtype=scores.dtype).masked_fill(apart, -100.0).unsqueeze(2)


def _windows(x: Tensor, size: list[int]) -> Tensor:
    """Take an image apart: (batch, height, width, channels) becomes (batch, windows, tokens, channels)."""
    x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _unwindow(x: Tensor, padded: torch.Size, size: list[int]) -> Tensor:
    """Put an image together again: (batch, windows, tokens, channels) becomes (batch, height, width, channels)."""
    x = x.unflatten(2, (size[0], size[1])).unflatten(1, (padded[0] // size[0], padded[1] // size[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class FreeGridAttention(nn.Module):
    """The attention of torchvision's MaxViT with ``n_heads`` heads of size ``head_dim``.

    The product of both need not be the width. This class is never constructed on its own: a resize or
    `PlasticNet.compact` mixes it into the class of a torchvision module that loses heads or channels.

    Example:
        >>> import torch, plasticnet as pn
        >>> from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
        >>> model = RelativePositionalMultiHeadAttention(8, head_dim=2, max_seq_len=4)
        >>> net = pn.PlasticNet(model, (torch.randn(2, 3, 4, 8),))
        >>> net.resize({"to_qkv": [0, 3]})
        >>> small = net.compact()
        >>> isinstance(small, pn.FreeGridAttention), small.n_heads, small.head_dim
        (True, 2, 2)
    """

    n_heads: int
    head_dim: int
    scale_factor: float
    to_qkv: nn.Linear
    merge: nn.Linear
    get_relative_positional_bias: Callable[[], Tensor]  # shape (1, heads, tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows; inputs and outputs have shape (batch, windows, tokens, channels)."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))


@dataclass(frozen=True)
class _Known:
    """An attention module of another library: the forward that can replace its own, and the names of its parts."""

    free: type[nn.Module]
    qkv: str
    heads: str


# Classes are known by their names, so that torchvision need not be installed.
_KNOWN = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): _Known(FreeWindowAttention, "qkv", "num_heads"),
    ("torchvision.models.maxvit", "RelativePositionalMultiHeadAttention"): _Known(
        FreeGridAttention, "to_qkv", "n_heads"
    ),
}


def _known(module: nn.Module) -> _Known | None:
    """Return what is known of the attention module's class, or None."""
    names = ((c.__module__, c.__name__) for c in type(module).__mro__)
    return next((_KNOWN[name] for name in names if name in _KNOWN), None)


def head_size(module: nn.Module) -> int | None:
    """Return the size of one head of an attention module that `free_heads` knows, and None for other modules."""
    if isinstance(module, nn.MultiheadAttention):
        return module.head_dim
    known = _known(module)
    if known is None:
        return None
    return getattr(module, "head_dim", None) or getattr(module, known.qkv).out_features // 3 // getattr(
        module, known.heads
    )


def _projected(module: nn.MultiheadAttention) -> tuple[int, int]:
    """Return the width of the inputs and the width of all heads together, judging by the parameters."""
    weight: Tensor = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    return weight.shape[1], weight.shape[0] // (1 if module.in_proj_weight is None else 3)


def free_heads(module: nn.Module, size: int) -> None:
    """Bring the sizes of an attention module up to date with its parameters, in place.

    Where the width of all heads is no longer the width of the inputs, the module also gets another class, whose forward
    needs no such relation. A subclass of ``nn.MultiheadAttention`` that has a forward of its own keeps it, and must
    cope with any size. Modules that are no known attention stay unchanged.

    Args:
        module: The module.
        size: The size of one head.
    """
    if isinstance(module, nn.MultiheadAttention):
        width, heads_width = _projected(module)
        module.num_heads, module.head_dim, module.embed_dim = heads_width // size, size, width
        separate = module.in_proj_weight is None
        module.kdim = module.k_proj_weight.shape[1] if separate else width
        module.vdim = module.v_proj_weight.shape[1] if separate else width
        if width != heads_width and not isinstance(module, FreeMultiheadAttention):
            if type(module).forward is not nn.MultiheadAttention.forward:
                return  # The module has a forward of its own, which must cope by itself.
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
    """Keep torch's encoder layers from their fused forward in this context.

    The fused forward knows neither hooks nor missing heads.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def unfuse_encoders(model: nn.Module) -> None:
    """Keep torch's encoders from making nested tensors, which only their fused forward can read."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


@cache
def _mixed(free: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a module's own class whose forward is the free one."""
    return type(f"Free{own.__name__}", (free, own), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """Return one of the classes that `free_heads` makes, which pickle looks up here by name."""
    for (module, own), known in _KNOWN.items():
        if name == f"Free{own}V2" or name == f"Free{own}":
            return _mixed(known.free, getattr(importlib.import_module(module), name.removeprefix("Free")))
    raise AttributeError(name)
