"""Small networks of kinds that no model library covers.

They are recurrent ones, a UNet, a generator, autoencoders, an ensemble, and networks on point clouds.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.ao import quantization


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


class ConvLSTM(nn.Module):
    """A convolutional LSTM whose state begins with zeros, and a head on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 16
        self.both = nn.Conv2d(3 + 16, 4 * 16, 3, padding=1)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, steps, 3, h, w) to (batch, 1, h, w)."""
        h = c = x.new_zeros(len(x), self.hidden, *x.shape[3:])
        for step in x.unbind(1):
            i, f, o, g = self.both(torch.cat([step, h], 1)).split(self.hidden, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


class VariationalAutoencoder(nn.Module):
    """A variational autoencoder, which draws its code in training and takes the mean in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.SiLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.Flatten())
        self.mean, self.log_variance = nn.Linear(16 * 64, 10), nn.Linear(16 * 64, 10)
        self.widen = nn.Linear(10, 16 * 64)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 12, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(12, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, 3, 32, 32) to the same, and the means and the logarithms of the variances of the codes."""
        h = self.encoder(x).relu()
        mean, log_variance = self.mean(h), self.log_variance(h)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(self.widen(code).relu().unflatten(1, (16, 8, 8))), mean, log_variance


class Ensemble(nn.Module):
    """Three networks whose weights are stacked in one parameter for each layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = [20, 32, 24, 4]
        self.weights = nn.ParameterList(torch.randn(3, a, b) / a**0.5 for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(3, 1, b) for b in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 20) to (batch, 3, 4)."""
        h = x.expand(3, -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = torch.baddbmm(bias, h, weight).relu()
        return torch.baddbmm(self.biases[-1], h, self.weights[-1]).transpose(0, 1)


def quantisation_aware() -> nn.Module:
    """Return a convolutional network whose weights are rounded while it trains, to ranges that are fixed."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4),
    ).train()  # fmt: skip
    model.qconfig = quantization.QConfig(nn.Identity, quantization.default_weight_fake_quant)  # pyright: ignore[reportArgumentType]
    quantization.prepare_qat(model, inplace=True)
    model(torch.randn(8, 3, 16, 16))
    return model.apply(quantization.disable_observer)


class PointNet(nn.Module):
    """A layer on each point that is turned by a small network, the largest of all points, and a head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.turn = nn.Sequential(_points(3, 16), _points(16, 32))
        self.matrix = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 9))
        self.features = nn.Sequential(_points(3, 16), _points(16, 24), _points(24, 48))
        self.head = nn.Sequential(nn.Linear(48, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, classes))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, points) to (batch, classes)."""
        turn = self.matrix(self.turn(x).amax(2)).unflatten(1, (3, 3)) + torch.eye(3).to(x)
        return self.head(self.features(torch.bmm(turn, x)).amax(2))


def _points(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(into, out, 1), nn.BatchNorm1d(out), nn.ReLU())


class DGCNN(nn.Module):
    """Edge convolutions among the nearest neighbours, which are sought anew among the features of each layer."""

    def __init__(self, neighbours: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.edges = nn.ModuleList(self._edge(a, b) for a, b in pairwise([3, 16, 16, 24]))
        self.last = _points(56, 48)
        self.head = nn.Sequential(nn.Linear(96, 24), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(24, classes))

    def _edge(self, into: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(2 * into, out, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2))

    def _neighbourhoods(self, x: Tensor) -> Tensor:
        """(batch, channels, points) to (batch, 2 * channels, points, neighbours)."""
        square = x.pow(2).sum(1, keepdim=True)
        near = 2 * torch.matmul(x.transpose(2, 1), x) - square - square.transpose(2, 1)
        index = near.topk(self.neighbours, dim=-1)[1]
        batch, _, points = x.shape
        index = (index + torch.arange(batch, device=x.device).view(-1, 1, 1) * points).view(-1)
        x = x.transpose(2, 1).contiguous()
        others = x.view(batch * points, -1)[index].view(batch, points, self.neighbours, -1)
        own = x.unsqueeze(2).expand_as(others)
        return torch.cat([others - own, own], 3).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, points) to (batch, classes)."""
        found: list[Tensor] = []
        for edge in self.edges:
            x = edge(self._neighbourhoods(x)).amax(3)
            found.append(x)
        x = self.last(torch.cat(found, 1))
        return self.head(torch.cat([x.amax(2), x.mean(2)], 1))
