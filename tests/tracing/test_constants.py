"""Tensors that are neither parameters nor buffers: nothing can cut them, so units beside them are frozen, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.networks import randomise_gates

MASK = torch.randn(6, 8).sign().relu()


class Masked(nn.Module):
    """A network whose second layer has a mask, as those of a MADE have.

    Args:
        held: Where the mask comes from.
    """

    def __init__(self, held: str) -> None:
        super().__init__()
        self.held = held
        self.stem, self.layer, self.side, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(4, 8), nn.Linear(6, 3)
        match held:
            case "buffer":
                self.register_buffer("mask", MASK)
            case "list":
                self.masks = [None, MASK]
            case "dict":
                self.masks = {"second": (MASK,)}
            case "scale":
                self.mask = torch.rand(8)
            case _:
                self.mask = MASK

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        masks: Any = getattr(self, "masks", None)
        match self.held:
            case "list":
                mask = masks[1]
            case "dict":
                mask = masks["second"][0]
            case "global":
                mask = MASK
            case "in forward":
                mask = (torch.arange(8) % 3 > 0).float().expand(6, -1)
            case "turned":
                mask = self.mask.t().clone().t() * 1.0
            case _:
                mask = self.mask
        match self.held:
            case "scale":
                h = self.layer(h * mask)
            case "bias":
                h = self.layer(F.linear(x, self.stem.weight, mask[0]))
            case "weight":
                h = F.linear(h, mask)
            case "weight, turned":
                h = h @ mask.T
            case "where":
                h = F.linear(h, torch.where(mask > 0, self.layer.weight, 0.0), self.layer.bias)
            case _:
                h = F.linear(h, self.layer.weight * mask, self.layer.bias)
        return self.head(h.relu())


@pytest.mark.parametrize(
    ("held", "named"),
    [
        *((held, "mask, which is an attribute and no buffer") for held in ("attribute", "turned", "scale", "bias")),
        *((held, "mask, which is an attribute and no buffer") for held in ("weight", "weight, turned", "where")),
        ("list", "masks[1], which is an attribute"),
        ("dict", "masks['second'][0], which is an attribute"),
        ("global", "a tensor that is neither a parameter nor a buffer of the model"),
        ("in forward", "a tensor that forward makes anew"),
    ],
)
def test_the_reason_names_what_cannot_be_cut_and_the_way_out(held: str, named: str) -> None:
    try:
        reason = pn.PlasticNet(Masked(held), (torch.randn(5, 4),)).frozen["stem"]
    except pn.PlasticError as error:
        reason = str(error).partition("stem: ")[2].partition("; head")[0]
    assert named in reason
    assert "register_buffer" in reason


@pytest.mark.parametrize("held", ["attribute", "where", "list", "dict", "global"])
def test_the_rows_of_a_masked_weight_are_named_too(held: str) -> None:
    assert "hold it in a buffer" in pn.trace(Masked(held), (torch.randn(5, 4),)).frozen["layer"]


def test_a_buffer_is_the_way_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    net = pn.PlasticNet(Masked("buffer").double(), (x,)).eval()
    assert list(net.sites) == ["stem", "layer"]
    randomise_gates(net)
    torch.testing.assert_close(net.compact()(x), net(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h * torch.tensor(3.0),
        lambda h: h * torch.tensor([3.0]),
        lambda h: h + torch.zeros(h.shape[1]),
        lambda h: h + torch.zeros_like(h),
        lambda h: h * torch.arange(5.0)[:, None],
    ],
)
def test_constants_that_tell_no_units_apart_freeze_nothing(change: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(change(self.stem(x)))

    assert list(pn.PlasticNet(Net(), (torch.randn(5, 4),)).sites) == ["stem"]
