"""Small networks of kinds that no model library covers: recurrent ones, a UNet, a generator, an autoencoder."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class RecurrentClassifier(nn.Module):
    """An embedding, two recurrent layers, and a head on the last step."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.rnn = cell(16, 24, num_layers=2, batch_first=True)
        self.hidden = nn.Linear(24, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) token numbers to (batch, 5)."""
        steps, _ = self.rnn(self.embedding(tokens))
        return self.head(self.hidden(steps[:, -1]).relu())


class RecurrentTagger(nn.Module):
    """A recurrent layer in both directions and a head on every step."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 16)
        self.rnn = cell(16, 12, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 8) to (batch, length, 4)."""
        return self.head(self.rnn(self.inside(x).relu())[0])


def _double_conv(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Three levels, skip connections by concatenation, transposed convolutions on the way up."""

    def __init__(self, base: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = _double_conv(3, base), _double_conv(base, 2 * base)
        self.bottom = _double_conv(2 * base, 4 * base)
        self.up2 = nn.ConvTranspose2d(4 * base, 2 * base, 2, stride=2)
        self.merge2 = _double_conv(4 * base, 2 * base)
        self.up1 = nn.ConvTranspose2d(2 * base, base, 2, stride=2)
        self.merge1 = _double_conv(2 * base, base)
        self.head = nn.Conv2d(base, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, h, w) to (batch, 2, h, w); h and w are multiples of 4."""
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        y = self.bottom(nn.functional.max_pool2d(second, 2))
        y = self.merge2(torch.cat([second, self.up2(y)], 1))
        y = self.merge1(torch.cat([first, self.up1(y)], 1))
        return self.head(y)


class Generator(nn.Sequential):
    """DCGAN's generator: transposed convolutions from a code to an image of 32x32."""

    def __init__(self, code: int = 16, base: int = 8) -> None:
        layers: list[nn.Module] = []
        widths = [code, 4 * base, 2 * base, base]
        for i, (into, out) in enumerate(pairwise(widths)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(into, out, 4, stride, padding, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        super().__init__(*layers, nn.ConvTranspose2d(base, 3, 4, 2, 1), nn.Tanh())


class Autoencoder(nn.Module):
    """Strided and grouped convolutions down to a flat code, a linear layer and transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 24, 3, 2, 1, groups=4),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(24 * 64, 20),
        )
        self.widen = nn.Linear(20, 16 * 64)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 12, 4, 2, 1), nn.PReLU(12), nn.ConvTranspose2d(12, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to the same."""
        return self.decoder(self.widen(self.encoder(x)).relu().unflatten(1, (16, 8, 8)))


class Seq2Seq(nn.Module):
    """torch's own transformer: an encoder, a decoder and cross-attention over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 40)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(batch, length) token numbers, twice, to (batch, length, 40)."""
        return self.head(self.transformer(self.embedding(source), self.embedding(target)))


class MultilayerPerceptron(nn.Sequential):
    """Two hidden layers with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 32), nn.GELU(),
            nn.Linear(32, 4),
        )  # fmt: skip
