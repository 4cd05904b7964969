"""The table of sites: nested like the modules, equal layers once, what is frozen by reason."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from plasticnet import PlasticNet
from tests.kit.networks import mlp, small


class Layers(nn.Module):
    """Four residual layers of given widths behind a stem."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.stem = mlp(4, 7, 6)
        self.layers = nn.ModuleList(mlp(6, width, 6) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def table(model: nn.Module, **options: bool) -> list[tuple[str, ...]]:
    return list(PlasticNet(model, (torch.randn(2, 4),), **options).summary().rows())


def test_equal_layers_share_a_row() -> None:
    assert table(Layers(5, 5, 5)) == [
        ("stem.0", "7", "11", "10", "2"),
        ("layers.[0-2].0", "5", "13", "12", "2"),
    ]


def test_only_equal_layers_share_a_row() -> None:
    assert [row[:2] for row in table(Layers(5, 3, 5, 5))] == [
        ("stem.0", "7"), ("layers", ""), ("  [0,2-3].0", "5"), ("  1.0", "3"),
    ]  # fmt: skip


def test_rows_of_one_layer_are_indented_below_it() -> None:
    model = nn.Sequential(*(mlp(4, 5, 6, 4) for _ in range(2)), nn.Linear(4, 3))
    assert [(row[0], row[4]) for row in table(model)] == [
        ("0", ""), ("  0", "2"), ("  2", "4"), ("  4", "1.0"),
        ("1", ""), ("  0", "2"), ("  2", "4"), ("  4", "2"),
    ]  # fmt: skip


def test_a_site_below_a_site() -> None:
    """An input site lies in the table below the layer whose inputs it gates."""
    net, _ = small(inputs=("2",))
    assert [row[0] for row in net.summary().rows()] == ["0", "2"]
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    net = PlasticNet(model, (torch.randn(2, 1, 2, 2),), inputs=("2",))
    assert [row[:2] for row in net.summary().rows()] == [("0", "2"), ("2", "5"), ("  input", "8")]


def test_closed_units_are_counted() -> None:
    net, _ = small()
    with torch.no_grad():
        net.sites["0"].phi[:2] = -1
    summary = net.summary()
    assert [row[:2] for row in summary.rows()] == [("0", "4/6"), ("2", "5")]
    assert re.search(r"^0 +4/6 +", str(summary), re.MULTILINE)


def test_prunable_parameters_are_those_of_units() -> None:
    net, _ = small()
    summary = net.summary()
    assert summary.parameters - summary.prunable_parameters == 3  # the last layer's bias
    assert summary.as_dict()["prunable_parameters"] == summary.prunable_parameters
    assert "80 of 83 parameters belong to units (96.4%)" in str(summary)


def test_frozen_names_are_grouped_by_reason() -> None:
    net, _ = small()
    frozen = {"a": "because", **{f"b{i}": "of that" for i in range(5)}, "c": "because"}
    summary = replace(net.summary(), frozen=frozen)
    assert summary.reasons() == ["a, c: because", "b0, b1, b2 and 2 more: of that"]
    assert summary.reasons(every=True)[1] == "b0, b1, b2, b3, b4: of that"
    assert "frozen   a, c: because" in str(summary)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = mlp(4, width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_blocks_cost_what_they_cost_on_average() -> None:
    model = nn.Sequential(Residual(8), Residual(2), nn.Linear(4, 3))
    summary = PlasticNet(model, (torch.randn(2, 4),), blocks=("[01]",)).summary()
    (depth,) = [s for s in summary.sites if not s.consumers]
    assert depth.units == 2
    assert depth.unit_parameters == sum(p.numel() for p in model[:2].parameters()) / 2


def test_numbers_may_follow_a_name() -> None:
    model = nn.Sequential()
    for i in range(1, 4):
        model.add_module(f"layer_{i}", Residual(5))
    model.add_module("head", nn.Linear(4, 3))
    assert [row[0] for row in table(model)] == ["layer_[1-3].inner.0"]


def test_only_the_first_readers_are_named() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 5)
            self.branches = nn.ModuleList(nn.Linear(5, 2) for _ in range(5))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [branch(self.stem(x)) for branch in self.branches]

    assert table(Branches())[0][4] == "branches.0, branches.1, branches.2 and 2 more"
