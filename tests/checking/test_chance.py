"""Models in which rounding decides between values that are equal: the self-check need not freeze their units for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn


class Sorted(nn.Module):
    """Returns two rows for each sample, sorted by scores that are equal but for the rounding of a sum, or far apart.

    They are equal with the first random parameters of the self-check, where ``offset`` is 0.996, and not with the next
    two, where it is 1.26 and 1.11.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 24), nn.Linear(24, 1, bias=False), nn.Linear(24, 3)
        self.offset = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) to (2 batch, 3)."""
        h = self.first(x).tanh()
        other = (h * self.second.weight).sum(1) + (self.offset - 1.03).relu()
        y = self.third(h)
        return torch.cat([y, y + 1])[torch.cat([self.second(h)[:, 0], other]).argsort(stable=True)]


class ByPlace(nn.Module):
    """Sorts the samples by their first hidden unit, whichever that is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) to (batch, 3)."""
        h = self.first(x).tanh()
        return self.second(h)[h[:, 0].argsort()]


@pytest.mark.parametrize("seed", range(3))
def test_values_that_only_rounding_tells_apart(seed: int) -> None:
    torch.manual_seed(seed)
    assert list(pn.PlasticNet(Sorted(), (torch.randn(32, 6),)).sites) == ["first"]


@pytest.mark.parametrize("seed", range(3))
def test_units_that_are_read_by_their_places_stay_frozen(seed: int) -> None:
    torch.manual_seed(seed)
    with pytest.raises(pn.PlasticError, match="nothing to gate"):
        pn.PlasticNet(ByPlace(), (torch.randn(8, 6),))
