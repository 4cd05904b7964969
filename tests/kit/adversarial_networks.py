"""Whole networks for `adversarial`: dtypes, layouts, and rows that are not samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kit.adversarial import images, network


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(7, (3, 5)),)


def normal(*shape: int, dtype: torch.dtype | None = None) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape, dtype=dtype),)


@network(tokens, exact={"fc1": 6}, frozen={"embedding": "embedding|both produces and consumes"})
class TiedEmbedding(nn.Module):
    """Exact inside; the table is the vocabulary's on both sides, and is never gated."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc1, self.fc2 = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return F.linear(h + self.fc2(self.fc1(h).tanh()), self.embedding.weight)


@network(tokens, exact={"fc1": 6}, frozen={"embedding": "embedding", "fc2": "output"})
class PlainEmbedding(nn.Module):
    """Exact inside; embeddings and outputs are never gated unless asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc1, self.fc2 = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.embedding(x)).tanh()).mean(1)


class Complex(nn.Module):
    """Two complex layers, and what is returned of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, dtype=torch.complex64), nn.Linear(6, 5, dtype=torch.complex64)
        self.c = nn.Linear(5, 2, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


@network(
    normal(3, 4, dtype=torch.complex64),
    exact={"a": 6, "b": 5},
    frozen={"c": "output"},
)
class ComplexOutput(Complex):
    """Exact: a gate multiplies a complex number as any other."""


@network(
    normal(3, 4, dtype=torch.complex64),
    exact={"a": 6, "b": 5},
    frozen={"c": "output"},
)
class ComplexInside(Complex):
    """Exact: complex layers with a real output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


@network(normal(3, 4), exact={"a": 6, "b": 4}, frozen={"c": "output"})
class RealAndImaginary(nn.Module):
    """Exact: pairs of neighbouring features make up complex numbers and are taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(self.b(self.a(x).tanh()).unflatten(1, (-1, 2)))
        return self.c(torch.view_as_real(z * z.abs()).flatten(1))


class Mlp(nn.Module):
    """Two hidden layers and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


@network(normal(3, 4, dtype=torch.float16), exact={"a": 6, "b": 5}, frozen={"c": "output"})
class Half(Mlp):
    """Exact: half precision; compared within its rounding, or in double."""

    def __init__(self) -> None:
        super().__init__()
        self.half()


@network(normal(3, 4), exact={"a": 6, "b": 5}, frozen={"c": "output"})
class MixedHalf(Mlp):
    """Exact: bfloat16 layers within a network in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.b.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).tanh().to(self.b.weight.dtype))
        return self.c(h.to(x.dtype).tanh())


@network(images, exact={"a": 6, "b": 5}, frozen={"c": "output"})
class ChannelsLast(nn.Module):
    """Exact: another memory layout, which must be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 2, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.c(self.b(self.a(x).relu()).tanh())


# -- rows that are not samples ----------------------------------------------------------------


@network(normal(4, 4, 4), exact={"a": 6, "b": 5}, frozen={"c": "output"})
class TimeFirst(Mlp):
    """Exact: as many steps as samples, and the axes change places."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).tanh().transpose(0, 1)).cumsum(0)
        return self.c(h.tanh()).transpose(0, 1)


@network(normal(4, 4, 4), exact={"a": 6, "b": 5}, frozen={"c": "output"})
class FlatRows(Mlp):
    """Exact: rows are steps of samples (B*T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(len(x), -1, 2)


@network(normal(2, 4, 4, 4), exact={"proj": 6, "qkv": 2, "mlp": 5}, frozen={"out": "output"})
class WindowAttention(nn.Module):
    """Exact: attention within windows, so that rows are windows; a unit of qkv is a head."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.qkv, self.mlp, self.out = nn.Linear(4, 6), nn.Linear(6, 24), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).tanh()
        b, h, w, _ = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, x.shape[-1])
        q, k, v = self.qkv(x).unflatten(2, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.out(self.mlp(y).relu())
        y = y.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(b, h, w, -1)


@network(
    lambda: (torch.randn(4, 3), torch.randn(4, 5)), exact={"a": 6, "steps": 3, "mix": 6, "b": 5}, frozen={"c": "output"}
)
class StepsLikeSamples(nn.Module):
    """Exact: a second input has as many rows as there are samples, but they are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.steps, self.mix = nn.Linear(3, 6), nn.Linear(5, 3), nn.Linear(3, 6)
        self.b, self.c = nn.Linear(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        memory = self.mix(self.steps(steps).tanh()).mean(0).expand(len(x), -1)
        return self.c(self.b(torch.cat([self.a(x), memory], 1)).tanh())


@network(normal(3, 4), exact={"a": 6, "b": 5}, frozen={"c": "output", "auxiliary": "output"})
class Auxiliary(Mlp):
    """Exact: an auxiliary head that runs in training mode only reads the hidden units too."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.a(x).tanh()
        y = self.c(self.b(h).tanh())
        return (y, self.auxiliary(h)) if self.training else y


@network(normal(3, 4), exact={"first": 7, "a": 6, "b": 5})
class OtherBranch(nn.Module):
    """Exact: which layer reads the hidden units depends on the input, and tracing takes the other branch as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 7), nn.Linear(7, 6), nn.Linear(6, 5)
        self.c, self.other = nn.Linear(5, 2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.first(x).tanh()).tanh()
        return self.c((self.b(h) if x.sum() < 100 else self.other(h)).tanh())


@network(lambda: (torch.randn(3, 4), torch.rand(3, 6)), exact={"b": 5}, frozen={"a": "nothing to cut|combined"})
class MaskFromOutside(nn.Module):
    """Frozen: an input has one entry for each hidden unit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.c(self.b(self.a(x) * mask).tanh())
