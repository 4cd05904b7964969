"""The networks whose cost is measured, with free widths: a hand-written one is built at the widths that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from plasticnet.apps.models import LeNet5


class LeNet(LeNet5):
    """LeNet-5-Caffe of any widths: (batch, 1, 28, 28) to (batch, 10)."""

    def __init__(self, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(16 * second, hidden)
        self.fc2 = nn.Linear(hidden, 10)


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, into, h, w) to (batch, out, h / stride, w / stride)."""
        inside = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(inside)) + self.shortcut(x)).relu()


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR: (batch, 3, 32, 32) to (batch, 10) (He et al., arXiv 1512.03385, section 4.2).

    Their shortcuts pad with zeros (option A), which fixes where channels lie; these are 1x1 convolutions
    (option B), so that the channels of every stage can be gated.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        into = widths[0]
        for stage, out in enumerate(widths):
            for i in range(3):
                blocks.append(Block(into, out, 2 if stage and not i else 1))
                into = out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(into, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, 10)."""
        return self.fc(self.blocks(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


@dataclass(frozen=True)
class Network:
    """A network to measure: ``make(*widths)`` builds it, ``shape`` is that of one input."""

    name: str
    make: Callable[..., nn.Module]
    widths: tuple[int, ...]
    shape: tuple[int, ...]
    gates: Literal["sample", "batch"]  # what gates="auto" comes to, without the passes that find it out

    def share(self, open_units: float) -> tuple[int, ...]:
        """The widths when this share of the units is open, one at least."""
        return tuple(max(1, round(n * open_units)) for n in self.widths)

    def data(self, batch: int) -> tuple[Tensor, Tensor]:
        """Random inputs and labels."""
        return torch.randn(batch, *self.shape), torch.randint(10, (batch,))

    def sources(self, sites: Sequence[tuple[str, int]], widths: Sequence[int]) -> dict[str, range]:
        """What to keep of sites (name, units) so that the network comes to these widths."""
        left = dict(zip(self.widths, widths, strict=True))
        return {name: range(left[n]) for name, n in sites}


LENET = Network("LeNet-5", LeNet, (20, 50, 500), (1, 28, 28), "sample")
RESNET = Network("ResNet-20", ResNet20, (16, 32, 64), (3, 32, 32), "batch")
