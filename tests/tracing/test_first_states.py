"""Zeros that a model makes and puts beside other tensors, such as the first hidden state of a convolutional LSTM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.adversarial_checks import check_life
from tests.kit.networks import randomise_gates


class ConvLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h, self.conv, self.o = 8, nn.Conv2d(10, 32, 3, padding=1), nn.Conv2d(8, 1, 1)

    def first(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), self.h, 6, 6, dtype=x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = c = self.first(x)
        for t in range(x.shape[1]):
            i, f, o, g = self.conv(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.o(h)


class HardCoded(ConvLSTM):
    def first(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 8, 6, 6)


class ConvGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.both = 8, nn.Conv2d(10, 16, 3, padding=1)
        self.new, self.o = nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden, 6, 6)
        for t in range(x.shape[1]):
            r, z = self.both(torch.cat([x[:, t], h], 1)).sigmoid().chunk(2, 1)
            h = (1 - z) * h + z * self.new(torch.cat([x[:, t], r * h], 1)).tanh()
        return self.o(h)


class Cell(nn.Module):
    """The state comes first, and its width is that of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.o = nn.Linear(14, 8), nn.Linear(8, 2)

    def first(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.l.out_features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for t in range(x.shape[1]):
            h = self.l(torch.cat([h, x[:, t]], -1)).tanh()
        return self.o(h)


class BeginsWithOnes(Cell):
    def first(self, x: Tensor) -> Tensor:
        return x.new_ones(len(x), self.l.out_features)


class Shortcut(nn.Module):
    """Zeros beside channels, of which there is a fixed number: those that they are added to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 10, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c(torch.cat([x, x.new_zeros(len(x), 4, *x.shape[2:])], 1) + self.b(x))


class LaterSteps(nn.Module):
    """Zeros beside steps, which are then flattened with the channels."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.turned = nn.Linear(6, 8), nn.Linear(40, 2), turned

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = torch.cat([x, x.new_zeros(len(x), 2, x.shape[2])], 1)
        return self.b((x.transpose(1, 2) if self.turned else x).flatten(1))


class Never(nn.Module):
    """Zeros that never become units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x[:, 0]).relu()
        return self.c(self.b(torch.cat([x, x.new_zeros(len(x), 4)], 1)).relu())


VIDEO, STEPS, IMAGES = (2, 3, 2, 6, 6), (4, 3, 6), (4, 3, 4, 4)


@pytest.mark.parametrize(
    ("kind", "shape", "sites"),
    [
        (ConvLSTM, VIDEO, {"conv": 8}),
        (ConvGRU, VIDEO, {"both": 8}),
        (Cell, STEPS, {"l": 8}),
        (BeginsWithOnes, STEPS, {"l": 8}),
        (Shortcut, IMAGES, {"a": 6}),
        (LaterSteps, STEPS, {"a": 8}),
        (lambda: LaterSteps(turned=True), STEPS, {"a": 8}),
        (Never, STEPS, {"a": 8, "b": 5}),
    ],
)
def test_exact(kind: type[nn.Module], shape: tuple[int, ...], sites: dict[str, int], tmp_path: Path) -> None:
    net = pn.PlasticNet(kind(), (torch.randn(shape),))
    assert {n: len(s) for n, s in net.sites.items()} == sites
    assert all(s.units.growable for s in net.sites.values())
    check_life(kind, (torch.randn(shape),), tmp_path)


def test_a_width_that_is_hard_coded() -> None:
    with pytest.raises(pn.PlasticError, match=r"nothing to gate.*conv: the model does not run when units are cut"):
        pn.PlasticNet(HardCoded(), (torch.randn(VIDEO),))


class StackedCell(nn.Module):
    """A cell of a stack, which splits by a number of its own, and makes its first state if nobody gives it one."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inputs, self.hidden = inputs, hidden
        self.conv = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = self.conv(torch.cat([x, h], 1)).split(self.hidden, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Stacked(nn.Module):
    """A stack of cells, whose widths are in a list of the stack, or in each cell.

    Args:
        widths: The width of each cell.
        listed: Whether first states are as wide as the list says.
    """

    def __init__(self, widths: list[int], listed: bool) -> None:
        super().__init__()
        self.widths, self.listed = list(widths), listed
        self.cells = nn.ModuleList(StackedCell(i, o) for i, o in zip([2, *widths[:-1]], widths, strict=True))
        self.o = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for n, cell in enumerate(self.cells):
            width = self.widths[n] if self.listed else cell.hidden
            h = c = x.new_zeros(len(x), width, 4, 4)  # pyright: ignore[reportArgumentType]
            steps: list[Tensor] = []
            for t in range(x.shape[1]):
                h, c = cell(x[:, t], (h, c))
                steps.append(h)
            x = torch.stack(steps, 1)
        return self.o(x[:, -1])


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("widths", [[8, 6], [6, 6, 6]])
def test_a_stack_of_cells_with_a_list_of_widths(widths: list[int], listed: bool, tmp_path: Path) -> None:
    """Each cell follows its own entry of the list, also where all entries are equal."""
    torch.manual_seed(0)
    model = Stacked(widths, listed).double()
    x = torch.randn(2, 2, 2, 4, 4).double()
    net = pn.PlasticNet(model, (x,))
    assert {n: len(s) for n, s in net.sites.items()} == {f"cells.{i}.conv": n for i, n in enumerate(widths)}
    randomise_gates(net)
    wanted, small = net.eval()(x), net.compact()
    torch.testing.assert_close(small(x), wanted, rtol=0, atol=1e-9)
    pn.save(small, path := tmp_path / "small.safetensors")
    torch.testing.assert_close(pn.load(path, lambda: Stacked(widths, listed).double())(x), wanted, rtol=0, atol=1e-9)
    net.resize({"cells.0.conv": [1, 2, 5, -1], "cells.1.conv": [0, 4]})
    torch.testing.assert_close(net.compact()(x), net(x), rtol=0, atol=1e-9)
    assert len(net.sites["cells.0.conv"]) == 4
    assert net.model.get_submodule("cells.0").hidden == 4
