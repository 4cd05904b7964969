"""Where gates act on what a weight reads: on the input of its module, or in the weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn


class Reads(nn.Module):
    """A layer of one's own, which may change its input before it multiplies."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.weight = change, nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.change(x), self.weight)


@pytest.mark.parametrize(
    ("change", "per_sample"),
    [
        (lambda x: x, True),
        (lambda x: 2 * x.contiguous().double(), True),
        (lambda x: x.relu(), True),
        (lambda x: x.cos(), False),
        (lambda x: x + 1, False),
        (lambda x: x.exp(), False),
    ],
)
def test_gates_of_samples_do_what_gates_of_the_batch_do(change: Callable[[Tensor], Tensor], per_sample: bool) -> None:
    """A closed unit is read as zero. If the layer makes something else of a zero, gates must act in its weight."""
    x = torch.randn(4, 3).double()
    model = nn.Sequential(nn.Linear(3, 8), Reads(change), nn.Tanh(), nn.Linear(5, 2)).double()
    net = pn.PlasticNet(model, (x,)).eval()
    assert net.gating.per_sample == {"0": per_sample, "1": True}
    with torch.no_grad():
        net.sites["0"].phi[::2] = -1.0
        z = net.mean_gates()[0]
        assert (net.run(z, (x,), {}) - net.run(z.expand(4, -1), (x,), {})).abs().max() <= 1e-12
        assert (net(x) - net.compact()(x)).abs().max() <= 1e-12
