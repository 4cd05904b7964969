"""A network of residual blocks."""

from __future__ import annotations

from torch import Tensor, nn

N = 3


class Block(nn.Module):
    """A residual block with a hidden layer of its own."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 5), nn.Linear(5, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class InOrder(nn.Module):
    """Blocks in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.Sequential(*[Block() for _ in range(N)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)))


class After(nn.Module):
    """A residual block of convolutions with an activation after the sum, as in a ResNet."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Before(nn.Module):
    """A residual block of convolutions with the norms and activations before them."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class Stages(nn.Module):
    """A small ResNet: a stem, stages of blocks, and a linear head; blocks are ``stages.0.0``, ``stages.0.1``, ..."""

    def __init__(
        self, block: type[nn.Module] = After, stages: int = 2, depth: int = N, width: int = 4, classes: int = 3
    ) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.stages = nn.ModuleList(nn.Sequential(*[block(width) for _ in range(depth)]) for _ in range(stages))
        self.between = nn.ModuleList(nn.Conv2d(width, width, 2, stride=2) for _ in range(stages - 1))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.between[i - 1](x).relu())
        return self.head(x.mean((2, 3)))


class Attending(nn.Module):
    """A block of a transformer with two branches, attention and an MLP, with norms before them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, y, need_weights=False)[0])
        return x + self.dropout(self.down(self.up(self.norm2(x)).relu()))


class Reader(nn.Module):
    """A small transformer over sequences of 5 vectors."""

    def __init__(self, block: type[nn.Module] = Attending) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 3)
        self.layers = nn.Sequential(*[block() for _ in range(N)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean(1))
