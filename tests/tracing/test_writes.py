"""Writes into views: where a unit is no longer zero because its weights are, gates must not close it at its birth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.networks import randomise_gates


def _later(x: Tensor) -> Tensor:
    """Write to a tensor, and go on with a view that was taken before."""
    view = x.t()
    x.add_(1)
    return view.t()


def _into(write: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """Return what writes into a tensor and returns it."""

    def run(x: Tensor) -> Tensor:
        write(x)
        return x

    return run


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": _into(lambda x: x[:3].add_(1)),
    "flattened": _into(lambda x: x.view(-1).add_(0.5)),
    "turned": _into(lambda x: x.t().sigmoid_()),
    "detached": _into(lambda x: x.detach()[:2].add_(1)),
    "filled": _into(lambda x: x[:3].fill_(2.0)),
    "copied": _into(lambda x: x[:3].copy_(x[3:6].detach())),
    "numbered": _into(lambda x: x.narrow(0, 0, 4).cos_()),
    "a view from before": _later,
    "a view of a view": _into(lambda x: x[1:][:3].exp_()),
}


class Pair(nn.Module):
    """Single-head attention, in whose queries, or in both queries and keys, something is written.

    Args:
        write: What is written.
        both: Whether it is written into the keys, too.
    """

    def __init__(self, write: Callable[[Tensor], Tensor], both: bool) -> None:
        super().__init__()
        self.write, self.both = write, both
        self.query, self.key, self.value, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.write(self.query(x)), self.key(x)
        if self.both:
            k = self.write(k)
        return self.out((q @ k.t()).softmax(-1) @ self.value(x))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("way", WRITES)
def test_units_close_where_they_are_still_zero(way: str, both: bool) -> None:
    """Of queries that were written to, the keys close the units; where both were, nothing does."""
    torch.manual_seed(0)
    net = pn.PlasticNet(Pair(WRITES[way], both).double(), (torch.randn(10, 6).double(),)).eval()
    assert list(net.sites) == (["value"] if both else ["query", "value"])
    assert ("query" in net.frozen) == both
    for _ in range(3):
        randomise_gates(net)
        x = torch.randn(10, 6).double()
        torch.testing.assert_close(net.compact()(x), net(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("write", [lambda x: x[:3].mul_(2), lambda x: x[:3].relu_(), lambda x: x.t().div_(3)])
def test_what_leaves_zeros_alone_closes_as_before(write: Callable[[Tensor], object]) -> None:
    torch.manual_seed(0)
    net = pn.PlasticNet(Pair(_into(write), True).double(), (torch.randn(10, 6).double(),)).eval()
    assert list(net.sites) == ["query", "value"]
    randomise_gates(net)
    x = torch.randn(10, 6).double()
    torch.testing.assert_close(net.compact()(x), net(x), rtol=1e-9, atol=1e-9)
