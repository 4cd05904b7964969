"""How a block can begin as the identity: which layers are zero then, found by trying."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.units import BlockUnits
from tests.kit.blocks import After, Attending, Before, InOrder, Reader, Stages


def ends(model: nn.Module, x: Tensor, blocks: str) -> dict[str, tuple[str, ...] | None]:
    sites = pn.trace(model, (x,), blocks=[blocks]).sites.values()
    depth = [u for u in sites if isinstance(u, BlockUnits)]
    return {b: e for u in depth for b, e in zip(u.blocks, u.ends, strict=True)}


@pytest.mark.parametrize(
    ("model", "shape", "last"),
    [
        (InOrder(), (4, 4), ["down"]),
        (Stages(After), (4, 1, 8, 8), ["bn2"]),
        (Stages(Before), (4, 1, 8, 8), ["conv2"]),
        (Reader(), (4, 5, 3), ["down", "attention.out_proj"]),
    ],
)
def test_one_layer_at_the_end_of_each_branch(model: nn.Module, shape: tuple[int, ...], last: list[str]) -> None:
    x = torch.randn(shape)
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    found = ends(model, x, "stages.*.[0-2]" if isinstance(model, Stages) else "layers.?")
    assert len(found) == (6 if isinstance(model, Stages) else 3)
    assert found == {block: tuple(f"{block}.{end}" for end in last) for block in found}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_weights_that_are_zero_already_do_not_mislead() -> None:
    """As torchvision's ResNets begin with ``zero_init_residual``, where any layer seems to make the identity."""
    model = Stages(After, stages=1)
    for module in model.modules():
        if isinstance(module, After):
            nn.init.zeros_(module.bn2.weight)
            nn.init.zeros_(module.conv2.weight)
    assert ends(model, torch.randn(4, 1, 8, 8), "stages.0.?")["stages.0.0"] == ("stages.0.0.bn2",)


class NormAfter(Attending):
    """The norms come after the sums, so that nothing makes this the identity."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.down(self.up(x).relu()))


class Signed(After):
    """The activation after the sum is there, but it gets negative numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 1.0)


class LastFrozen(Before):
    """The last layer does not train, so that it could not leave zero, and without it there is no way."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.conv2.requires_grad_(False)


class Lowered(Before):
    """Dropout on the stream, so that it is the identity in evaluation only."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("block", [NormAfter, Signed, LastFrozen, Lowered])
def test_where_nothing_makes_the_identity_that_is_said(block: type[nn.Module]) -> None:
    if block is NormAfter:
        found = ends(Reader(block), torch.randn(4, 5, 3), "layers.?")
    else:
        found = ends(Stages(block, stages=1), torch.randn(4, 1, 8, 8), "stages.0.?")
    assert len(found) == 3
    assert set(found.values()) == {None}


def test_a_batch_of_one_that_norms_reject_in_training_is_tried_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(_Small(), _Small()), nn.Linear(4, 2))
    assert ends(model, torch.randn(1, 4), "1.?") == {"1.0": ("1.0.norm",), "1.1": ("1.1.norm",)}


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.up(x))
