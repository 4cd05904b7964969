"""Norms by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMS(nn.Module):
    """RMSNorm by hand."""

    def __init__(self, width: int, way: str = "method") -> None:
        super().__init__()
        self.scale, self.way = nn.Parameter(torch.rand(width) + 0.5), way

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2)
        if self.way == "method":
            mean = square.mean(-1, keepdim=True)
        elif self.way == "keywords":
            mean = torch.mean(square, dim=[-1], keepdim=True)
        elif self.way == "dropped":
            mean = square.mean(-1).unsqueeze(-1)
        else:
            mean = torch.mean(square, (x.dim() - 1,), True)
        return self.scale * (x * torch.rsqrt(mean + 1e-6))


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2), channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.pow(2).sum((1, 2), keepdim=True).sqrt()
        return self.bias + self.weight * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + x
