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
