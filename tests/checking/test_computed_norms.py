"""``residual=True`` where the weight of a norm is no parameter itself: cast, viewed, or computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import plasticnet as pn

WIDTH = 16


class Norm(nn.Module):
    """A norm that is written as a function of its parameters."""

    def __init__(self, call: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        for name, shape in (shapes or {"w": (WIDTH,), "b": (WIDTH,)}).items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape) + 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, x.shape[-1:], *self.parameters())


class Plus(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 1 + w


def parametrized() -> nn.Module:
    norm = nn.LayerNorm(WIDTH)
    parametrize.register_parametrization(norm, "weight", Plus())
    return norm


def in_single(x: Tensor, n: Any, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x.float(), n, w.float(), b.float()).type_as(x)


def halves(x: Tensor, n: Any, p: Tensor) -> Tensor:
    return F.layer_norm(x, n, p[: len(p) // 2], p[len(p) // 2 :])


IMAGE = {"w": (1, WIDTH, 1, 1), "b": (1, WIDTH, 1, 1)}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "in single precision": lambda: Norm(in_single),
    "1 + weight": lambda: Norm(lambda x, n, w, b: F.layer_norm(x, n, 1 + w, b)),
    "bias first": lambda: Norm(lambda x, n, b, w: F.layer_norm(x, n, w, b), b=(WIDTH,), w=(WIDTH,)),
    "bias only": lambda: Norm(lambda x, n, b: F.layer_norm(x, n, None, b), b=(WIDTH,)),
    "flattened": lambda: Norm(lambda x, n, w, b: F.layer_norm(x, n, w.flatten(), b.flatten()), **IMAGE),
    "selected": lambda: Norm(lambda x, n, w, b: F.layer_norm(x, n, w[0, :, 0, 0], b[0, :, 0, 0]), **IMAGE),
    "rows of one": lambda: Norm(lambda x, n, p: F.layer_norm(x, n, p[0], p[1]), p=(2, WIDTH)),
    "halves of one": lambda: Norm(halves, p=(2 * WIDTH,)),
    "product": lambda: Norm(lambda x, n, w, b: F.layer_norm(x, n, w * b, b)),
    "root mean square": lambda: Norm(lambda x, n, w, b: F.rms_norm(x.float(), n, 1 + w.float()).type_as(x) + b),
    "group": lambda: Norm(lambda x, n, w, b: F.group_norm(x[..., None], 1, w * 2, b.exp())[..., 0]),
    "parametrized": parametrized,
    "of another width too": lambda: Norm(
        lambda x, n, w, b: (
            F.layer_norm(x, n, w.clone(), b) * F.layer_norm(torch.eye(3, dtype=x.dtype), (3,)).exp().mean()
        )
    ),
}


def gated(norm: nn.Module, dtype: torch.dtype) -> tuple[pn.PlasticNet, Tensor]:
    model = nn.Sequential(nn.Linear(6, WIDTH), norm, nn.Tanh(), nn.Linear(WIDTH, 8), nn.Linear(8, 3)).to(dtype)
    x = torch.randn(4, 6, dtype=dtype)
    return pn.PlasticNet(model, x, residual=True), x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_the_stream_is_gated_and_compact_is_exact(name: str, dtype: torch.dtype) -> None:
    net, x = gated(NORMS[name](), dtype)
    assert list(net.sites) == ["0", "3"]
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[torch.randperm(len(site))[: len(site) // 2]] = -1
    out = net.eval()(x)
    found = net.compact()(x)
    assert found.dtype == out.dtype == dtype
    single = 1e-6 if dtype == torch.float64 else 0.0  # some of the norms compute in single precision
    assert (found - out).abs().max() <= max(4 * torch.finfo(dtype).eps, single) * out.abs().max()


def test_two_norms_that_share_a_weight_are_both_masked() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
            self.one, self.two = nn.LayerNorm(8), nn.LayerNorm(8)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(self.stem(x)).tanh()))

    x = torch.randn(5, 4).double()
    net = pn.PlasticNet(Shared().double(), x, residual=True)
    with torch.no_grad():
        net.sites["stem"].phi[:3] = -1
    assert (net.eval()(x) - net.compact()(x)).abs().max() <= 1e-12


@pytest.mark.parametrize("weight", [torch.ones, torch.rand], ids=["ones", "random"])
def test_a_weight_without_units_freezes_with_the_true_reason(weight: Callable[[int], Tensor]) -> None:
    torch.manual_seed(1)
    fixed = weight(WIDTH)
    net, _ = gated(Norm(lambda x, n, w, b: F.layer_norm(x, n, fixed, b)), torch.float32)
    assert list(net.sites) == ["3"]
    assert "a vector of its own" in net.frozen["0"]
    assert "residual=True" not in net.frozen["0"]


def test_a_rule_that_fails_freezes_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise IndexError("no such axis")

    from plasticnet.tracing.mode import RULES

    monkeypatch.setitem(RULES, "aten::tanh", broken)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net = pn.PlasticNet(model, (torch.randn(3, 4),))
    assert list(net.sites) == ["2"]
    assert "aten::tanh" in net.frozen["0"]
    assert "no such axis" in net.frozen["0"]
