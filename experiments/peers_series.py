"""ETTh1 and an LSTM for peers.py: how a transformer's load changes in 24 hours, after 48 hours of seven series.

The cell is written out, so that every way can multiply and cut its units. Months are divided as others divide them:
12 to train on, 4 to validate, 4 to test (Zhou et al., arXiv 2012.07436).
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor, nn

MONTH, HOURS, AHEAD = 30 * 24, 48, 24
LOAD = 0  # the column of the high useful load
Part = tuple[Tensor, Tensor]


class Lstm(nn.Module):
    """A layer of features, an LSTM whose last state is read, and a hidden layer.

    Args:
        inputs: The number of series.
        features: The width of the layer before the LSTM.
        state: The width of the LSTM.
        hidden: The width of the layer after it.
    """

    def __init__(self, inputs: int, features: int, state: int, hidden: int) -> None:
        super().__init__()
        self.first, self.act1 = nn.Linear(inputs, features), nn.ReLU()
        self.x, self.h = nn.Linear(features, 4 * state), nn.Linear(state, 4 * state, bias=False)
        self.state = nn.Identity()
        self.up, self.act2, self.out = nn.Linear(state, hidden), nn.ReLU(), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, hours, series) to (batch, 1)."""
        steps = self.x(self.act1(self.first(x))).unbind(1)
        h = c = torch.zeros(len(x), self.h.in_features, dtype=x.dtype, device=x.device)
        for step in steps:
            i, f, g, o = (step + self.h(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * g.tanh()
            h = self.state(torch.sigmoid(o) * c.tanh())
        return self.out(self.act2(self.up(h)))


def temperatures(folder: Path) -> tuple[Part, Part, Part]:
    """Windows to train on, to validate and to test; each series is normalised by what the first 12 months hold."""
    rows = list(csv.reader((folder / "series" / "ETTh1.csv").open()))[1:]
    x = torch.tensor([[float(v) for v in row[1:]] for row in rows])
    x = (x - x[: 12 * MONTH].mean(0)) / x[: 12 * MONTH].std(0)

    def windows(begin: int, end: int) -> Part:
        inputs = x[begin:end].unfold(0, HOURS, 1).transpose(1, 2)[: end - begin - HOURS - AHEAD + 1]
        return inputs.contiguous(), x[begin + HOURS + AHEAD - 1 : end, LOAD] - inputs[:, -1, LOAD]

    return windows(0, 12 * MONTH), windows(12 * MONTH, 16 * MONTH), windows(16 * MONTH, 20 * MONTH)
