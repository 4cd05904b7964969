"""Which units stay: those that a norm counts are not cut with their features."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.norms import RMS


class Flat(nn.Module):
    """Units that a norm counts, and that are read as single features, and as a whole where there is a side."""

    def __init__(self, norm: Callable[[], nn.Module], shape: tuple[int, ...], side: bool) -> None:
        super().__init__()
        layer = (lambda *sizes: nn.Conv2d(*sizes, 1)) if len(shape) == 4 else nn.Linear
        self.a, self.norm = layer(3, 6), norm()
        self.fc, self.out = nn.Linear(6 * math.prod(shape) // (3 * shape[0]), 7), nn.Linear(7, 2)
        self.side = layer(6, 7) if side else None
        self.axes = (2, 3) if len(shape) == 4 else (1,)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        features = self.fc(h.flatten(1))
        return self.out((features if self.side is None else features + self.side(h).sum(self.axes)).tanh())


LINES, IMAGES = (5, 2, 3), (5, 3, 2, 2)
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(6), LINES),
    "RMSNorm": (lambda: nn.RMSNorm(6), LINES),
    "custom RMSNorm": (lambda: RMS(6), LINES),
    "GroupNorm": (lambda: nn.GroupNorm(1, 6), IMAGES),
}


def normed(name: str, side: bool, **options: object) -> tuple[pn.PlasticNet, Tensor]:
    make, shape = NORMS[name]
    x = torch.randn(shape).double()
    net = pn.PlasticNet(Flat(make, shape, side), (x,), residual=True, **options)  # pyright: ignore[reportArgumentType]
    assert len(net.sites["a"]) == 6
    return net.eval(), x


def features_of(net: pn.PlasticNet, units: list[int], x: Tensor) -> list[int]:
    """The features of some units in the input of ``fc``."""
    per_unit = len(net.sites["fc.input"]) // 6
    if x.dim() == 4:
        return [u * per_unit + i for u in units for i in range(per_unit)]
    return [u + i * 6 for u in units for i in range(per_unit)]


def close(gates: Tensor, some: list[int]) -> None:
    with torch.no_grad():
        gates[..., some] = -1.0


def assert_exact(net: pn.PlasticNet, x: Tensor) -> None:
    """Compaction and pruning leave the outputs as they are."""
    y = net(x)
    assert (net.compact()(x) - y).abs().max() <= 1e-12 * y.abs().max()
    net.prune()
    assert (net(x) - y).abs().max() <= 1e-12 * y.abs().max()
    assert (net.compact()(x) - y).abs().max() <= 1e-12 * y.abs().max()


@pytest.mark.parametrize("k", [math.inf, 7.0])
@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_an_open_unit_of_a_norm_stays_without_its_features(name: str, side: bool, k: float) -> None:
    net, x = normed(name, side, inputs=("fc",))
    net.k = k
    close(net.sites["fc.input"].phi, features_of(net, [0, 4], x))
    assert_exact(net, x)
    assert len(net.sites["a"]) == 6


@pytest.mark.parametrize("inputs", [(), ("fc",)])
@pytest.mark.parametrize("name", NORMS)
def test_an_open_unit_of_a_norm_stays_without_weights_that_read_it(name: str, inputs: tuple[str, ...]) -> None:
    net, x = normed(name, False, weights=("fc",), inputs=inputs)
    columns = [0, 6] if x.dim() == 3 else [0, 1, 2, 3]
    close(net.weights["fc.weight"].phi, columns)  # all that reads unit 0
    assert_exact(net, x)
    assert len(net.sites["a"]) == 6


@pytest.mark.parametrize("k", [math.inf, 7.0])
@pytest.mark.parametrize("name", NORMS)
def test_a_closed_unit_of_a_norm_does_not_stay_for_the_last_features(name: str, k: float) -> None:
    net, x = normed(name, True, inputs=("fc",))
    net.k = k
    close(net.sites["fc.input"].phi, features_of(net, [1, 2, 3, 4, 5], x))
    net.prune()
    close(net.sites["a"].phi, [0])  # the only unit whose features are left
    random = torch.get_rng_state()
    y, small = net(x), net.compact()
    assert small.a.weight.shape[0] == 5
    assert (small(x) - y).abs().max() <= 1e-12 * y.abs().max()
    assert torch.equal(torch.get_rng_state(), random)
    assert_exact(net, x)


@pytest.mark.parametrize("options", [{"inputs": ("fc",)}, {"inputs": ("fc",), "weights": ("fc",)}])
@pytest.mark.parametrize("name", NORMS)
def test_a_budget_counts_the_units_that_stay(name: str, options: dict[str, tuple[str, ...]]) -> None:
    net, x = normed(name, False, **options)
    whole = sum(p.numel() for p in net.model.parameters())
    scores = {n: torch.rand(len(s)) for n, s in net.sites.items()}
    pn.prune_once(net, pn.Budget(params=0.5), scores=scores)
    small, y = net.compact(), net(x)
    assert sum(p.numel() for p in small.parameters()) <= whole / 2
    assert (small(x) - y).abs().max() <= 1e-12 * y.abs().max()
