"""Random networks: a list of steps, each drawn by hypothesis, run in order on (batch, 3, 4, 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

STEPS = ("conv", "depthwise", "grouped", "norm", "groupnorm", "relu", "residual", "concat", "split", "twice", "gate")


class Generated(nn.Module):
    """Runs ``steps`` on a stack of channels, then flatten, hidden layer, output."""

    def __init__(self, steps: list[tuple[str, int]], hidden: int) -> None:
        super().__init__()
        self.steps = steps
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        layers: list[nn.Module] = []
        width = 8
        for kind, n in steps:
            layer, width = _layer(kind, width, 4 * n)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)
        self.fc1 = nn.Linear(width * 4, hidden)
        self.fc2 = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for (kind, _), layer in zip(self.steps, self.layers, strict=True):
            if kind == "residual":
                x = x + layer(x)
            elif kind == "concat":
                x = torch.cat([x, layer(x)], 1)
            elif kind == "split":
                a, b = layer(x).chunk(2, 1)
                x = a * b.sigmoid()
            elif kind == "twice":
                x = layer(layer(x).relu())
            elif kind == "gate":
                x = x * layer(x.mean((2, 3), keepdim=True)).sigmoid()
            else:
                x = layer(x)
        x = F.max_pool2d(x, 2).flatten(1)
        return self.fc2(self.fc1(x).relu())


def _layer(kind: str, width: int, new: int) -> tuple[nn.Module, int]:
    conv = nn.Conv2d
    match kind:
        case "conv":
            return conv(width, new, 3, padding=1), new
        case "depthwise":
            return conv(width, 2 * width, 3, padding=1, groups=width), 2 * width
        case "grouped":
            return conv(width, new, 3, padding=1, groups=4), new
        case "norm":
            return nn.BatchNorm2d(width), width
        case "groupnorm":
            return nn.GroupNorm(4, width), width
        case "relu":
            return nn.LeakyReLU(inplace=True), width
        case "concat":
            return nn.Sequential(conv(width, new, 1), nn.PReLU(new)), width + new
        case "split":
            return conv(width, 2 * new, 1), new
        case _:  # residual, twice, gate: they keep the width
            return conv(width, width, 1), width


networks = st.builds(
    Generated,
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 3)), min_size=1, max_size=5),
    st.integers(2, 6),
)


def randomise(model: nn.Module) -> nn.Module:
    """Parameters and statistics away from their initial values, in double precision."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() > 1 else 0.2) + (0.0 if p.dim() > 1 else 0.8))
        for b in model.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5)
    return model.double()
