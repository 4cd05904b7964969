"""Scores that know of repair: what others can replace is worth nothing, and what is left of a pair is worth all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet
from plasticnet.oneshot.replaceable import _Leaving  # pyright: ignore[reportPrivateUsage]
from tests.kit.networks import ConvNet, images, mlp


class Doubled(nn.Module):
    """Every unit of the first layer is there twice, the second time scaled by 2."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        self.a: nn.Module = nn.Conv2d(3, 8, 3, padding=1) if convolution else nn.Linear(12, 8)
        self.b = nn.Conv2d(8, 5, 3) if convolution else nn.Linear(8, 5)
        with torch.no_grad():
            for p in self.a.parameters():
                p[4:] = 2 * p[:4]

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return y.mean((2, 3)) if y.dim() == 4 else y


@pytest.mark.parametrize("convolution", [False, True])
def test_one_of_each_pair_is_worth_little_and_the_other_all(convolution: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 3, 6, 6) if convolution else torch.randn(400, 12)
    net = PlasticNet(Doubled(convolution), (x[:2],))
    fisher, found = pn.scores(net, "fisher", batches=[x])["a"], pn.scores(net, "repair", batches=[x])["a"]
    share = (found / fisher).view(2, 4)
    assert (share <= 1).all()
    assert (share.min(0).values < 0.25).all()
    assert (share.max(0).values > 2 * share.min(0).values).all()


def test_independent_units_are_worth_what_they_are() -> None:
    x = torch.randn(4000, 6)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Identity(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
    net = PlasticNet(model, (x[:2],))
    fisher, found = pn.scores(net, "fisher", batches=[x])["0"], pn.scores(net, "repair", batches=[x])["0"]
    torch.testing.assert_close(found, fisher, rtol=0.15, atol=0)


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("model", [mlp(6, 24, 24, 3), ConvNet()])
def test_units_may_be_closed_before(model: nn.Module, mended: bool) -> None:
    x = images(60) if isinstance(model, ConvNet) else torch.randn(60, 6)
    net = PlasticNet(model, (x[:2],))
    for share in (0.7, 0.5):
        pn.prune_once(net, pn.Budget(macs=share), scores="repair", batches=x.split(20), cut=False)
        if mended:
            pn.repair(net, x.split(20))
    assert net.summary().open_macs <= 0.5 * net.summary().macs
    assert all(bool(s.isfinite().all()) for s in pn.scores(net, "repair", batches=x.split(20)).values())


@pytest.mark.parametrize("options", [{}, {"inputs": ("fc1",)}, {"residual": True}])
def test_all_sites_have_scores_and_the_budget_is_met(options: dict[str, object]) -> None:
    x = images(60)
    net = PlasticNet(ConvNet(), (x[:2],), **options)  # pyright: ignore[reportArgumentType]
    found = pn.scores(net, "repair", batches=x.split(20))
    fisher = pn.scores(net, "fisher", batches=x.split(20))
    for name, site in net.sites.items():
        assert found[name].shape == (len(site),)
        assert (found[name] <= fisher[name] * 1.0001).all()
    whole = net.summary().macs
    pn.prune_once(net, pn.Budget(macs=0.5), scores="repair", batches=x.split(20))
    assert net.summary().macs <= 0.5 * whole


@pytest.mark.parametrize("width", [1, 3])
def test_what_is_left_is_the_inverse_of_what_is_left(width: int) -> None:
    torch.manual_seed(0)
    n = 200 // width  # so many that the columns are subtracted in several blocks
    x = torch.randn(1000, n * width, dtype=torch.float64) @ torch.randn(n * width, n * width, dtype=torch.float64)
    covariance = x.mT @ x / len(x)
    covariance += torch.diag(0.1 * covariance.diagonal())
    weight, where = torch.randn(n * width, 4, dtype=torch.float64), torch.randperm(n * width).view(n, width)
    reader = _Leaving(covariance, weight, where)
    for unit in range(0, n - 5):
        reader.remove(unit)
    for unit in range(n - 5, n):
        others = torch.cat([where[i] for i in range(n - 5, n) if i != unit])
        own = where[unit]
        part = covariance[own][:, others]
        missing = covariance[own][:, own] - part @ torch.linalg.solve(covariance[others][:, others], part.mT)
        expected = (weight[own] * (missing @ weight[own])).sum()
        torch.testing.assert_close(reader.rest()[unit], expected)


def test_inputs_that_hardly_move_are_no_trouble() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 3))
    with torch.no_grad():
        model[0].bias[:150] = 1.5  # most units are nearly constant, and far from 0
        model[0].weight[:150] *= 1e-4
    net = PlasticNet(model, (torch.randn(2, 6),))
    found = pn.scores(net, "repair", batches=[torch.randn(50, 6) for _ in range(3)])["0"]
    assert found.isfinite().all()
    assert (found >= 0).all()


def test_it_needs_inputs() -> None:
    x = torch.randn(10, 4)
    net = PlasticNet(mlp(4, 6, 3), (x,))
    with pytest.raises(PlasticError, match="inputs without labels"):
        pn.scores(net, "repair", lambda: net(x).square().mean(1))


class Deep(nn.Module):
    """Layers one after the other, of which one is called twice, beside a stream that all of them add to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.up = nn.ModuleList(nn.Linear(12, width) for width in (9, 15, 7))
        self.down = nn.ModuleList(nn.Linear(width, 12) for width in (9, 15, 7))
        self.norm = nn.LayerNorm(12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in (0, 1, 1, 2):
            x = x + self.down[i](self.up[i](x).relu())
        return self.last(self.norm(x))


@pytest.mark.parametrize("options", [{}, {"residual": True}])
@pytest.mark.parametrize("memory", [0, 3000, 6000])
def test_sums_in_groups_give_what_a_single_pass_gives(
    options: dict[str, bool], memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 6).double()
    net = PlasticNet(Deep().double(), (x[:2],), residual=bool(options))
    whole = pn.scores(net, "repair", batches=x.split(20))
    monkeypatch.setattr("plasticnet.oneshot.replaceable.MEMORY", memory)
    found = pn.scores(net, "repair", batches=x.split(20))
    fisher = pn.scores(net, "fisher", batches=x.split(20))
    for name in net.sites:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(found[n], fisher[n]) for n in net.sites)


def test_groups_go_on_from_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) if i % 2 == 0 else nn.ReLU() for i in range(15)]
    x = torch.randn(60, 8)
    net = PlasticNet(nn.Sequential(*layers), (x[:2],))
    monkeypatch.setattr("plasticnet.oneshot.replaceable.MEMORY", 0)
    counted = list[int]()
    own = torch.ops.aten.addmm.default

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            counted.append(1) if func is own else None
            return func(*args, **(kwargs or {}))

    from plasticnet.oneshot.replaceable import unreplaceable

    batches, fisher = list(x.split(20)), torch.ones(sum(map(len, net.sites.values())))
    with torch.no_grad(), Counting():
        unreplaceable(net.eval(), fisher, batches, 60, None)
    assert len(net.sites) == 7
    assert len(counted) <= 8 + 3 * 2 * 8  # a run to look, and of each batch each layer once, and the one it begins with
