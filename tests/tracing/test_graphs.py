"""Networks on graphs and point clouds, and mixtures of experts, are cut through the sums over their rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.adversarial_checks import check_life, close_units, distance, precise
from tests.kit.graphs import EGNN, GAT, GCN, GIN, NODES, SAGE, EdgeConv, Mixture

Case = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], dict[str, int], dict[str, str]]

_EXPERTS = {f"experts.{i}.0": 6 for i in range(3)}
CASES: dict[str, Case] = {  # the network, the shapes of its inputs, the sites, and reasons of what is frozen
    "GCN": (GCN, ((NODES, 4),), {"a": 8, "b": 6}, {"c": "output"}),
    "SAGE": (SAGE, ((NODES, 4),), {"own.0": 8, "own.1": 6}, {"out": "output"}),
    "GIN": (GIN, ((NODES, 4),), {"a": 8, "b": 6}, {"c": "output"}),
    "GAT, whole heads": (GAT, ((NODES, 4),), {"a": 4, "b": 6}, {"c": "output"}),
    "EGNN": (
        EGNN, ((NODES, 4), (NODES, 3)), {"embed": 8, "edge": 10, "message": 7}, {"shift": "broadcast|output"},
    ),
    "DGCNN, the points of the inputs": (
        lambda: EdgeConv(False), ((2, 3, 5),), {"a": 8, "b": 7, "c": 6}, {"out": "output"},
    ),
    "DGCNN, the nearest features": (
        lambda: EdgeConv(True), ((2, 3, 5),), {"b": 7, "c": 6}, {"a": "product of two activations|reduced over"},
    ),
    "a mixture, added": (Mixture, ((9, 4),), {"inp": 8, **_EXPERTS}, {"gate": "softmax"}),
    "a mixture, set": (lambda: Mixture("set"), ((9, 4),), {"inp": 8, **_EXPERTS}, {"gate": "softmax"}),
}  # fmt: skip


def inputs(shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape).double() for shape in shapes)


@pytest.mark.parametrize("name", CASES)
def test_cut_exactly_also_on_other_inputs(name: str) -> None:
    make, shapes, sites, frozen = CASES[name]
    net = pn.PlasticNet(precise(make()), inputs(shapes))
    assert {n: len(s) for n, s in net.sites.items()} == sites, net.frozen
    for module, reason in frozen.items():
        assert re.search(reason, net.frozen[module]), net.frozen[module]
    for share in (0.3, 0.8):
        close_units(net, share)
        for _ in range(3):
            x = inputs(shapes)
            assert distance(net.eval()(*x), net.compact()(*x)) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "mixture" not in name])  # which trains some experts only
def test_saved_trained_and_grown(name: str, tmp_path: Path) -> None:
    make, shapes, *_ = CASES[name]
    check_life(make, inputs(shapes), tmp_path)


def test_a_mixture_has_the_same_sites_whichever_expert_its_inputs_choose() -> None:
    torch.manual_seed(0)
    model = Mixture("set").double()
    x = torch.randn(200, 4).double()
    chosen = model.gate(x).argmax(-1)
    nets = [pn.PlasticNet(precise(Mixture("set")), (x[chosen == i][:4],)) for i in range(3)]
    assert all({n: len(s) for n, s in net.sites.items()} == {"inp": 8, **_EXPERTS} for net in nets)
    close_units(nets[0], 0.5)
    nets[1].load_state_dict(nets[0].state_dict())
    assert distance(nets[1].eval()(x), nets[0].compact()(x)) <= 1e-9
