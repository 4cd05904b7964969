"""Norms by hand, of every statistic, count the open channels: compact equals evaluation, or they are frozen."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.adversarial_checks import check_exact, distance, precise, train


class Norm(nn.Module):
    """A function of the channels on one axis, times a scale and plus a shift."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int, rank: int, axis: int) -> None:
        super().__init__()
        shape = [1] * rank
        shape[axis] = width
        self.function, self.root = function, width**0.5
        self.scale, self.shift = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * self.scale + self.shift


def centred(x: Tensor, dim: int | tuple[int, ...] = 1) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def by_both(x: Tensor, way: Callable[..., tuple[Tensor, Tensor]], **options: object) -> Tensor:
    spread, mean = way(x, dim=1, keepdim=True, **options)
    return (x - mean) / (spread + 1e-3)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {  # of shape (rows, channels)
    "mean, var": lambda x: centred(x) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "var of n - 1": lambda x: centred(x) * torch.var(x, -1, keepdim=True).add(1e-5).rsqrt(),
    "var, keepdim off": lambda x: centred(x) / x.var(dim=1).sqrt()[:, None],
    "var, correction 2": lambda x: centred(x) / x.var(1, correction=2, keepdim=True).sqrt(),
    "std": lambda x: centred(x) / (x.std(-1, keepdim=True) + 1e-5),
    "std, biased, by name": lambda x: centred(x) / (torch.std(input=x, dim=[1], correction=0, keepdim=True) + 1e-5),
    "var_mean": partial(by_both, way=torch.var_mean, unbiased=False),
    "var_mean of n - 1": partial(by_both, way=torch.var_mean),
    "std_mean": partial(by_both, way=torch.std_mean, correction=0),
    "norm and a shape": lambda x: x / (x.norm(dim=1, keepdim=True) * x.shape[1] ** -0.5 + 1e-8),
    "norm and a size": lambda x: x / (torch.norm(x, 2, -1, True) / math.sqrt(x.size(-1)) + 1e-8),
    "norm and sizes": lambda x: x / (torch.linalg.norm(x, dim=1)[:, None] * x.size()[1] ** -0.5 + 1e-8),
    "vector_norm": lambda x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "vector_norm, order 1": lambda x: x / torch.linalg.vector_norm(x, 1, -1, keepdim=True),
    "norm, order 3": lambda x: x / x.norm(3, 1, True),
    "norm, infinite order": lambda x: x / x.norm(float("inf"), dim=1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "normalize, order 1, last": lambda x: F.normalize(x, p=1.0, dim=-1, eps=1e-6),
    "sum of squares": lambda x: x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10),
    "sum of squares, dropped": lambda x: x * torch.sum(x * x, dim=-1).add(1e-6).rsqrt().unsqueeze(-1),
    "sum over a shape": lambda x: x / ((x**2).sum(1, keepdim=True) / x.shape[1] + 1e-6).sqrt(),
    "sum over n + 1": lambda x: x / ((centred(x) ** 2).sum(1, keepdim=True) / (x.shape[1] + 1) + 1e-3).sqrt(),
    "share": lambda x: x.exp() / x.exp().sum(1, keepdim=True),
}
MAPS: dict[str, Callable[[Tensor], Tensor]] = {  # of shape (samples, channels, height, width)
    "var at each place": lambda x: centred(x) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "std, counted from the end": lambda x: centred(x, -3) / (x.std(-3, keepdim=True) + 1e-5),
    "normalize": F.normalize,
    "norm": lambda x: x / (x.norm(p=2, dim=1, keepdim=True) + 1e-10),
    "over all places": lambda x: centred(x, (1, 2, 3)) / (x.var((1, 2, 3), keepdim=True) + 1e-5).sqrt(),
    "sums over all places": lambda x: x / x.pow(2).sum((-1, 1, 2), keepdim=True).sqrt(),
}
FROZEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "largest": (lambda x: x / x.abs().amax(1, keepdim=True), "reduced over its channels by aten::amax"),
    "product": (lambda x: x * x.prod(1, keepdim=True), "reduced over its channels by aten::prod"),
    "over everything": (lambda x: x / x.std(), "reduced over its channels by aten::std"),
    "median": (lambda x: x - x.median(1, keepdim=True)[0], "reduced over its channels by aten::median"),
    "a fixed width": (lambda x: x / (x.norm(dim=1, keepdim=True) * 12**-0.5), ""),  # exact, as the next one is not
    "fixed and read": (lambda x: x * x.sum(1, keepdim=True) / len(x.t()), "tracing cannot see"),
    "two sums": (lambda x: x / (x.sum(1, keepdim=True) + x.t().sum(0)[:, None] * 0 + x.cumsum(1)), "accumulated over"),
    "something else, too": (
        lambda x: x / x.std(1, keepdim=True) * torch.ones(len(x), 3).to(x).std(1, keepdim=True).add(1),
        "its layer also takes a std over the same axis of something else",
    ),
}  # fmt: skip


def rows(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), Norm(function, 12, 2, 1), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))


def maps(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), Norm(function, 12, 4, 1), nn.Conv2d(12, 9, 1), nn.Tanh(), nn.Conv2d(9, 3, 1)
    )


NETWORKS = {
    **{name: (partial(rows, f), (5, 6)) for name, f in ROWS.items()},
    **{f"{name}, of images": (partial(maps, f), (4, 3, 2, 2)) for name, f in MAPS.items()},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_compact_equals_evaluation(name: str, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    x = torch.randn(shape).double()
    net = pn.PlasticNet(precise(make()), (x,), residual=True)
    assert {n: len(s) for n, s in net.sites.items()} == {"0": 12, "2": 9}, net.frozen
    assert not net.sites["0"].units.growable
    check_exact(net, (x,), net.eval()(x))
    small = net.compact()
    pn.save(small, tmp_path / "small.safetensors")
    loaded = pn.load(tmp_path / "small.safetensors", lambda: precise(make()))
    other = torch.randn(shape).double()
    assert distance(small(other), loaded(other)) <= 1e-12
    assert distance(net(other), small(other)) <= 1e-9
    optimizer = torch.optim.Adam(net.param_groups(1e-3))
    train(net, optimizer, (x,))
    net.resize({"0": [1, 2, 5, 7, 8], "2": [*range(9), -1]}, optimizer)
    train(net, optimizer, (x,))
    check_exact(net, (x,), net.eval()(x))


@pytest.mark.parametrize("name", ["var of n - 1", "std", "std, biased, by name", "normalize", "norm and a shape"])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_few_open_channels_still_give_numbers(name: str, left: int) -> None:
    x = torch.randn(5, 6).double()
    net = pn.PlasticNet(precise(rows(ROWS[name])), (x,), residual=True)
    least = 2 if name in ("var of n - 1", "std") else 1
    with torch.no_grad():
        net.sites["0"].phi.copy_(torch.linspace(-2, -1, 12))
        net.sites["0"].phi[:left] = 1.0
    masked, small = net.eval()(x), net.compact()
    assert masked.isfinite().all()
    assert small[0].out_features == max(left, least)
    assert distance(masked, small(x)) <= 1e-9
    net.k = math.inf
    net.prune()
    assert len(net.sites["0"]) == max(left, least)
    assert net(x).isfinite().all()


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_with_its_reason(name: str) -> None:
    function, reason = FROZEN[name]
    x = torch.randn(5, 6).double()
    net = pn.PlasticNet(precise(rows(function)), (x,), residual=True)
    if not reason:
        check_exact(net, (x,), net.eval()(x))
        return
    assert {n: len(s) for n, s in net.sites.items()} == {"2": 9}
    assert re.search(reason, net.frozen["0"]), net.frozen["0"]


@pytest.mark.parametrize("name", NETWORKS)
def test_without_residual_they_are_frozen(name: str) -> None:
    make, shape = NETWORKS[name]
    assert re.search("reduced over its channels.*residual=True", pn.trace(make(), (torch.randn(shape),)).frozen["0"])


def test_the_scale_of_the_first_width_stays() -> None:
    """vit_pytorch's RMSNorm: the root of the width is a number of the module, also after the cut."""

    class RMS(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=-1) * self.root * self.scale

    x = torch.randn(5, 6).double()
    model = rows(lambda x: x)
    model[1] = RMS(lambda x: x, 12, 1, 0)
    net = pn.PlasticNet(precise(model), (x,), residual=True)
    assert "0" in net.sites
    check_exact(net, (x,), net.eval()(x))


def test_a_view_by_the_shape_beside_a_count_of_it_is_frozen() -> None:
    def both(x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1], 1)[:, :, 0] / (x.norm(dim=1, keepdim=True) * x.shape[1] ** -0.5)

    net = pn.PlasticNet(precise(rows(both)), (torch.randn(5, 6).double(),), residual=True)
    assert re.search("tracing cannot see", net.frozen["0"])
