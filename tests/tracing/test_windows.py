"""Operations that read places in space pass the channels: windows, grids, boxes and deformable convolutions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

import plasticnet as pn
from tests.kit.adversarial_checks import check_life, distance
from tests.kit.rows import Maps, check_cut_through, check_frozen

GRID = torch.linspace(-1, 1, 2 * 3 * 3 * 2).view(2, 3, 3, 2)
BOXES = torch.tensor([[0, 0.0, 0.0, 3.0, 3.0], [1, 1.0, 0.0, 3.0, 2.0], [1, 0.0, 0.0, 1.0, 3.0]])


def turned(x: Tensor) -> Tensor:
    angle = torch.tensor([[[0.8, -0.6, 0.0], [0.6, 0.8, 0.1]]]).to(x).expand(len(x), -1, -1)
    return F.grid_sample(x, F.affine_grid(angle, list(x.shape), align_corners=False), align_corners=False)


def fractional(x: Tensor) -> Tensor:
    samples = torch.full((2, 1, 2), 0.4).to(x).expand(-1, x.shape[1], -1)
    return F.fractional_max_pool2d(x, 2, 3, _random_samples=samples)


def over_channels(x: Tensor) -> Tensor:
    patches = F.unfold(x.transpose(1, 2), 2).unflatten(1, (4, 4)).mean(2)
    return patches[:, None, :, :3].expand(-1, 8, -1, -1)


def on_itself(x: Tensor) -> Tensor:
    return F.grid_sample(x, x.reshape(2, 8, 8, 2).tanh(), align_corners=False)


EXACT: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "windows": (lambda x: x.unfold(2, 3, 1).unfold(3, 2, 2).sum((-2, -1)), 8),
    "windows, negative dim": (lambda x: x.unfold(-1, 2, 1).amax(-1), 8),
    "patches": (lambda x: F.unfold(x, 3, padding=1).unflatten(1, (-1, 9)).mul(0.5).amax(2).unflatten(2, (4, 4)), 8),
    "patches as channels": (lambda x: F.unfold(x, 2, stride=2).unflatten(2, (2, 2)), 8),
    "patches and back": (lambda x: F.fold(F.unfold(x, 3, padding=1).tanh(), x.shape[2:], 3, padding=1), 8),
    "back from channels": (lambda x: F.fold(x.flatten(2), (8, 8), 2, stride=2), 2),
    "grid": (lambda x: F.grid_sample(x, GRID.to(x), align_corners=True), 8),
    "grid, padded and nearest": (
        lambda x: F.grid_sample(x, 2 * GRID.to(x), "nearest", "reflection", align_corners=False), 8,
    ),
    "affine grid": (turned, 8),
    "unpooled": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 8),
    "fractional pooling": (fractional, 8),
    "nearest, exact": (lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"), 8),
    "roi_align": (lambda x: ops.roi_align(x, BOXES.to(x), 2), 8),
    "roi_align, a list": (lambda x: ops.roi_align(x, [BOXES[:1, 1:].to(x), BOXES[1:, 1:].to(x)], (2, 3)), 8),
    "roi_pool": (lambda x: ops.roi_pool(x, BOXES.to(x), 2), 8),
    "ps_roi_align": (lambda x: ops.ps_roi_align(x, BOXES.to(x), 2), 2),
    "ps_roi_pool": (lambda x: ops.ps_roi_pool(x, BOXES.to(x), 2), 2),
    "circular padding": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), 8),
}  # fmt: skip
FROZEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "windows of channels": (lambda x: x.unfold(1, 2, 1).sum(-1), "windows over its channels"),
    "patches over channels": (over_channels, "mixed over its channels"),
    "coordinates of channels": (on_itself, "used as coordinates"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_channels_pass(name: str, tmp_path: Path) -> None:
    between, units = EXACT[name]
    check_cut_through(Maps, between, torch.randn(2, 3, 4, 4), tmp_path, units)


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_with_its_reason(name: str) -> None:
    between, reason = FROZEN[name]
    check_frozen(Maps, between, torch.randn(2, 3, 4, 4), reason)


class Deformable(nn.Module):
    """A deformable convolution whose offsets and mask are computed from what it reads."""

    def __init__(self, groups: int = 1, offset_groups: int = 1, bias: bool = True, mask: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Conv2d(8, 18 * offset_groups, 1)
        self.mask = nn.Conv2d(8, 9 * offset_groups, 1) if mask else None
        self.deform = ops.DeformConv2d(8, 12, 3, padding=1, groups=groups, bias=bias)
        self.c = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        mask = None if self.mask is None else self.mask(x).sigmoid()
        return self.c(self.deform(x, self.offset(x), mask).tanh())


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        ({}, {"a": 8, "deform": 12}),
        ({"bias": False, "mask": False}, {"a": 8, "deform": 12}),
        ({"offset_groups": 2}, {"a": 4, "deform": 12}),  # both halves keep as many
        ({"groups": 2}, {"a": 2}),  # a unit is a whole group, its inputs and its outputs
        ({"groups": 4, "offset_groups": 4}, {}),
    ],
    ids=str,
)
def test_deformable_convolutions(options: dict[str, int], sites: dict[str, int], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    if not sites:
        with pytest.raises(pn.PlasticError, match="single unit"):
            pn.PlasticNet(Deformable(**options), (x,))
        return
    net = pn.PlasticNet(Deformable(**options), (x,))
    assert {n: len(s) for n, s in net.sites.items()} == sites
    assert "offsets or the mask" in net.frozen["offset"]
    grown = check_life(lambda: Deformable(**options), (x,), tmp_path)
    other = torch.randn_like(x).double()
    assert distance(grown.eval()(other), grown.compact()(other)) <= 1e-9


def test_the_boxes_of_a_layer_are_frozen() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.boxes, self.b = nn.Conv2d(3, 8, 1), nn.Linear(3, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            boxes = self.boxes(x.mean((2, 3))).sigmoid() * 3
            boxes = torch.cat([torch.arange(len(x)).to(x)[:, None], boxes], 1)
            return self.b(ops.roi_align(self.a(x), boxes, 1).flatten(1))

    net = pn.PlasticNet(Boxes(), (torch.randn(2, 3, 4, 4),))
    assert list(net.sites) == ["a"]
    assert net.frozen["boxes"] == "used as boxes"
