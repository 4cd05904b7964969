"""A statistic that nobody reads freezes nothing; one that is read in any way does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.adversarial_checks import check_exact, distance, precise

OUTSIDE: list[Tensor] = []


class Model(nn.Module):
    """Two layers, and something on the side that gets the module and what lies between them."""

    def __init__(self, side: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 7), nn.Linear(7, 3)
        self.side, self.stat, self.log = side, torch.zeros(()), []
        self.kept = SimpleNamespace(stat=torch.zeros(()))
        self.register_buffer("average", torch.zeros(()))
        OUTSIDE.clear()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        more = self.side(self, h)
        h = h if more is None else h * more
        return self.c(self.b(h).tanh())


def keep(stat: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], None]:
    def side(m: Any, h: Tensor) -> None:
        m.stat = stat(h)

    return side


def entropy(h: Tensor) -> Tensor:
    p = h.softmax(1)
    return -(p * p.clamp(min=1e-9).log()).sum(1).mean()


def appended(m: Any, h: Tensor) -> None:
    m.log.append(h.std(1).detach())


def fan_in(m: Any, h: Tensor) -> float:
    return (2 / m.a.weight[0].numel()) ** 0.5


def of_a_view(m: Any, h: Tensor) -> float:
    return 1 / m.a.weight.flatten(1)[:1].t().shape[0]


def running(m: Any, h: Tensor) -> None:  # the mean of means is for the log, too
    m.stat = 0.9 * m.stat + 0.1 * h.mean().detach()


GATED: dict[str, Callable[[Any, Tensor], Any]] = {
    "kept in an attribute": keep(lambda h: h.mean().detach()),
    "not detached": keep(lambda h: h.mean(1)),
    "an entropy": keep(entropy),
    "a norm": keep(lambda h: h.norm()),
    "the first channel": keep(lambda h: h[:, 0].clone()),
    "in place, on a copy": keep(lambda h: h.clone().sub_(h.mean(1, keepdim=True)).pow_(2).mean()),
    "appended to a list": appended,
    "thrown away": lambda m, h: setattr(m, "places", len(h.sort(1)[0])),
    "a running mean": running,
    "in an object": lambda m, h: setattr(m.kept, "stat", h.amax()),
    "outside": lambda m, h: OUTSIDE.append(h.argmax(1)),
    "the length of a row": fan_in,
    "the length of a view": of_a_view,
}


def value(m: Any, h: Tensor) -> float:
    return 1 + h.mean().item()


def listed(m: Any, h: Tensor) -> float:
    return 1 + h.mean(1).tolist()[0] * 1e-12  # so little that no comparison would show it


def as_array(m: Any, h: Tensor) -> float:
    return 1 + float(np.asarray(h.detach().mean(1).numpy())[0]) * 1e-12


def branch(m: Any, h: Tensor) -> float:
    return 2.0 if h.mean() > 1e9 else 1.0


def by_shape(m: Any, h: Tensor) -> float:
    return 1.0 if len((h.mean(1) > 1e9).nonzero()) == 0 else 2.0


def read_later(m: Any, h: Tensor) -> Tensor:
    before, m.stat = m.stat, h.mean().detach()
    return 1 + before * 1e-12


def read_from_an_object(m: Any, h: Tensor) -> Tensor:
    before, m.kept.stat = m.kept.stat, h.mean().detach()
    return 1 + before * 1e-12


def read_from_outside(m: Any, h: Tensor) -> Any:
    OUTSIDE.append(h.mean().detach())
    return 1 + OUTSIDE[-2] * 1e-12 if len(OUTSIDE) > 1 else None


def read_in_evaluation(m: Any, h: Tensor) -> Any:
    if m.training:
        m.stat = h.mean().detach()
        return None
    return 1 + m.stat * 1e-12


def written_to_a_buffer(m: Any, h: Tensor) -> Any:
    if m.training:
        m.average.lerp_(h.mean().detach(), 0.1)
        return None
    return 1 + m.average * 1e-12


def written_through_a_view(m: Any, h: Tensor) -> Tensor:
    out = torch.ones(2, 2).to(h)
    out[0].add_(h.mean() * 1e-12)
    return out.sum() / 4


def by_gradient(m: Any, h: Tensor) -> Tensor:
    with torch.enable_grad():
        x = torch.ones((), requires_grad=True)
        (g,) = torch.autograd.grad((h.detach().mean() * x).tanh(), x)
    return 1 + g * 1e-12


FROZEN = {
    f.__name__.replace("_", " "): f
    for f in (
        value, listed, as_array, branch, by_shape, read_later, read_from_an_object, read_from_outside,
        read_in_evaluation, written_to_a_buffer, written_through_a_view, by_gradient,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", GATED)
def test_what_nobody_reads_freezes_nothing(name: str) -> None:
    x = torch.randn(4, 6).double()
    net = pn.PlasticNet(precise(Model(GATED[name])), (x,))
    assert {n: len(s) for n, s in net.sites.items()} == {"a": 16, "b": 7}, net.frozen
    check_exact(net, (x,), net.eval()(x))
    small = net.compact()
    for _ in range(3):
        other = torch.randn(4, 6).double()
        assert distance(net(other), small(other)) <= 1e-9


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_read_in_any_way_freezes(name: str) -> None:
    net = pn.PlasticNet(precise(Model(FROZEN[name])), (torch.randn(4, 6).double(),))
    assert {n: len(s) for n, s in net.sites.items()} == {"b": 7}
    assert "reduced over its channels" in net.frozen["a"]


def test_what_is_returned_beside_the_output_freezes_unless_it_is_not_read() -> None:
    class Both(Model):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, self.stat

    x = torch.randn(4, 6)
    assert "reduced over" in pn.trace(Both(GATED["kept in an attribute"]), (x,)).frozen["a"]
    assert "a" in pn.trace(Both(GATED["kept in an attribute"]), (x,), outputs=lambda out: out[0]).sites
