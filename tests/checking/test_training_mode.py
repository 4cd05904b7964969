"""Widths that a model reads as numbers in training mode alone: what reads them is frozen, and nothing else."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.checking.draws import EvenDraws
from plasticnet.tools.inputs import calls_of
from plasticnet.tracing.mode import Tracer
from plasticnet.tracing.runs import observe
from tests.kit.networks import randomise_gates

WAYS = [
    "times", "root", "loss", "length", "of another", "constant tensor", "other number", "attribute",
    "dropout of its own", "after dropout", "generator of Python",
]  # fmt: skip


class OwnDropout(nn.Dropout):
    """Dropout whose scale is the width."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (input.shape[1] if self.training else 1)


class Reading(nn.Module):
    """Three layers, of which the second reads its width in training mode alone.

    Args:
        way: How it reads it, or "" for a model that does not.
        norm: Whether a BatchNorm follows the first layer.
    """

    def __init__(self, way: str, norm: bool = False) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)])
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = OwnDropout(0.5) if way == "dropout of its own" else nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = (
            self.drop(self.norm(self.layers[0](x)).relu())
            if self.way == "after dropout"
            else self.norm(self.layers[0](x)).relu()
        )
        y = self.layers[1](x).tanh()
        if self.way == "dropout of its own":
            y = self.drop(y)
        if self.way == "other number":
            y = y * (y.shape[1] if self.training else 1)
        if self.training:
            match self.way:
                case "times" | "after dropout":
                    y = y * y.shape[1]
                case "root":
                    y = y / math.sqrt(y.shape[-1])
                case "length":
                    y = y * len(self.layers[1].weight)  # pyright: ignore[reportArgumentType]
                case "of another":
                    y = y + torch.zeros(y.shape[1], 2).shape[0]
                case "constant tensor":
                    y = y * torch.tensor(y.shape[1])
                case "attribute":
                    y = y * self.layers[1].out_features
                case "generator of Python":
                    y = y * (y.shape[1] if random.random() + np.random.rand() < 3 else 1)
                case "loss":
                    out = self.layers[2](y)
                    return out, out.square().mean() * y.shape[1]
                case _:
                    pass
        return self.layers[2](y)


def differences(net: pn.PlasticNet, x: Tensor) -> float:
    """Return how far the gated network and the compact module are apart in training mode, without dropout."""
    randomise_gates(net)
    small = net.eval().compact()
    net.k = math.inf
    outputs: list[Any] = []
    for model in (net, small):
        model.train()
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.eval()
        with torch.no_grad(), EvenDraws():
            outputs.append(model(x))
    whole, cut = ([out] if isinstance(out, Tensor) else out for out in outputs)
    return max(float((a - b).abs().max()) for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_width_that_training_reads_is_frozen(way: str, norm: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)
    net = pn.PlasticNet(Reading(way, norm).double(), (x,))
    assert list(net.sites) == ["layers.0"]
    assert "changes the output in training mode" in net.frozen["layers.1"]
    assert differences(net, x) <= 1e-9


class Auxiliary(nn.Module):
    """A head that runs in training mode alone, as in GoogLeNet, and perhaps reads the width of the trunk there.

    Args:
        reads: Whether the head reads a width as a number.
    """

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.aux = nn.ModuleList([nn.Conv2d(8, 5, 1), nn.Linear(5, 4)])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        out = self.head(self.body(x).relu().mean((2, 3)))
        if not self.training:
            return out
        side = self.aux[0](x).relu().mean((2, 3))
        return out, self.aux[1](side * side.shape[1] if self.reads else side)


@pytest.mark.parametrize("reads", [False, True])
def test_an_auxiliary_head(reads: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    net = pn.PlasticNet(Auxiliary(reads).double(), (x,))
    assert set(net.sites) == {"stem", "body"} | (set() if reads else {"aux.0"})
    assert differences(net, x) <= 1e-9


class Dropping(nn.Module):
    """What many models do in training mode alone, and what no width enters: dropout in its forms, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.drops = nn.Sequential(nn.Dropout(0.2), nn.Dropout2d(0.3))
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drops(self.norm(self.stem(x)).relu())
        x = F.dropout(x, 0.4, self.training).flatten(2).transpose(1, 2)
        if self.training:  # stochastic depth, as torchvision and timm write it
            x = x * x.new_empty(len(x), 1, 1).bernoulli_(0.8).div_(0.8)
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


@pytest.mark.parametrize("half", [False, True])
def test_dropout_and_batch_norm_make_no_difference_between_the_modes(half: bool) -> None:
    model, x = Dropping(), torch.randn(2, 3, 4, 4)
    model, x = (model.half(), x.half()) if half else (model, x)
    assert [call.training for call in observe(model, Tracer, calls_of((x,))).calls] == [False]
    assert [call.training for call in observe(Reading("times"), Tracer, calls_of((torch.randn(2, 5),))).calls] == [
        False, True,
    ]  # fmt: skip


class Cropping(Reading):
    """Draws from a generator of its own in training mode, so that no two calls are alike."""

    def __init__(self) -> None:
        super().__init__("")
        self.generator = np.random.default_rng()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(x * self.generator.random() if self.training else x)


def test_a_model_that_does_not_repeat_itself_in_training_is_compared_in_evaluation() -> None:
    x = torch.randn(4, 5)
    net = pn.PlasticNet(Cropping(), (x,))
    assert list(net.sites) == ["layers.0", "layers.1"]
    before = random.getstate(), np.random.get_state()[1].sum()  # pyright: ignore
    pn.PlasticNet(Reading("times"), (x,))
    assert (random.getstate(), np.random.get_state()[1].sum()) == before  # pyright: ignore
