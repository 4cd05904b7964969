"""One shot: the budget is met, the function is that of masking, nothing changes on error. Sensitivity: the losses are
those of closing by hand, and the network is what it was."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet
from plasticnet.oneshot.scores import KINDS
from tests.kit.blocks import InOrder
from tests.kit.heavy import heavy
from tests.kit.networks import ConvNet, assert_same, images, mlp, randomise_gates, train_step

SCOPES: tuple[Literal["global", "uniform"], ...] = ("global", "uniform")


def trained(model: nn.Module | None = None, **options: Any) -> tuple[PlasticNet, Optimizer, Callable[[], Tensor]]:
    """A network after one step in double precision, its optimizer and a loss."""
    x, y = images(12).double(), torch.arange(12) % 3
    net = PlasticNet((model or ConvNet()).double(), (x,), **options)
    optimizer = Adam(net.param_groups(1e-3))
    train_step(net, optimizer, x)
    return net, optimizer, lambda: F.cross_entropy(net(x), y, reduction="none")


def present(net: PlasticNet) -> dict[str, float]:
    size = net.summary()
    return {"macs": size.open_macs, "params": size.open_parameters, "units": sum(s.open for s in size.sites)}


def everything(net: PlasticNet, optimizer: Optimizer) -> Any:
    gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    values = {n: t.clone() for n, t in net.state_dict().items()}
    state = [(id(p), {k: v.clone() for k, v in s.items()}) for p, s in optimizer.state.items()]
    flags = [m.training for m in net.modules()]
    return values, gradients, state, flags, net.k, torch.get_rng_state(), [id(p) for p in net.parameters()]


# -- prune_once -------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [(), ("fc1",)])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "repair"])
@pytest.mark.parametrize("cost", ["macs", "params", "units"])
def test_the_budget_is_met(cost: str, kind: str, scope: Literal["global", "uniform"], inputs: tuple[str, ...]) -> None:
    net, optimizer, loss = trained(inputs=inputs)
    before, had = present(net), {n: len(s) for n, s in net.sites.items()}
    cut = pn.prune_once(net, pn.Budget(**{cost: 0.5}), optimizer, scores=kind, scope=scope, loss=loss)
    assert present(net)[cost] <= 0.5 * before[cost]
    assert cut == {n: had[n] - len(s) for n, s in net.sites.items() if len(s) < had[n]}
    assert sum(p.numel() for p in net.compact().parameters()) == present(net)["params"]
    train_step(net, optimizer, images(12).double())  # the optimizer has the new parameters


@pytest.mark.parametrize("inputs", [(), ("fc1",)])
@pytest.mark.parametrize("scope", SCOPES)
def test_cutting_is_closing(scope: Literal["global", "uniform"], inputs: tuple[str, ...]) -> None:
    net, _, loss = trained(inputs=inputs)
    given = {n: torch.rand(len(s)) for n, s in net.sites.items()}
    masked, _, _ = trained(inputs=inputs)
    masked.load_state_dict(net.state_dict())
    pn.prune_once(net, pn.Budget(params=0.4), scores=given, scope=scope, loss=loss)
    with torch.no_grad():
        for name, site in masked.sites.items():
            left = len(net.sites[name])
            site.phi[given[name].argsort()[: len(site) - left]] = -1.0
    x = images(5).double()
    if not inputs:  # else features went with their channels, and not by their own scores
        torch.testing.assert_close(net.eval()(x), masked.eval()(x))
        assert {n: len(s) for n, s in net.sites.items()} == {n: int(s.open.sum()) for n, s in masked.sites.items()}
    torch.testing.assert_close(net.compact()(x), net.eval()(x))


def test_global_keeps_the_best_and_uniform_equal_shares() -> None:
    def small() -> PlasticNet:
        torch.manual_seed(0)
        return PlasticNet(mlp(4, 8, 16, 3), (torch.randn(2, 4),))

    given = {"0": torch.arange(8.0), "2": torch.arange(16.0) + 100}
    net = small()
    rows = net.model[0].weight[4:].clone()
    assert pn.prune_once(net, pn.Budget(units=0.5), scores=given, scope="uniform") == {"0": 4, "2": 8}
    assert torch.equal(net.model[0].weight, rows)  # the highest scores
    net = small()
    assert pn.prune_once(net, pn.Budget(units=12.0), scores=given) == {"0": 7, "2": 5}
    net = small()
    net.limit("0", minimum=3)
    assert pn.prune_once(net, pn.Budget(units=8), scores=given, scope="uniform") == {"0": 5, "2": 11}


@pytest.mark.parametrize("units", range(3, 24))
def test_uniform_keeps_the_largest_share_that_fits(units: int) -> None:
    sizes = (8, 16)
    net = PlasticNet(mlp(4, *sizes, 3), (torch.randn(2, 4),))
    pn.prune_once(net, pn.Budget(units=units), scope="uniform")
    shares = [i / 16 for i in range(17)]  # by hand: all that can make a difference
    kept = [[max(1, math.floor(s * n)) for n in sizes] for s in shares]
    assert [len(s) for s in net.sites.values()] == max(k for k in kept if sum(k) <= units)


@pytest.mark.parametrize("scope", SCOPES)
def test_blocks_are_closed_and_compact_removes_them(scope: Literal["global", "uniform"]) -> None:
    torch.manual_seed(0)
    net = PlasticNet(InOrder(), (torch.randn(2, 4),), blocks=("layers.?",))
    before = present(net)["macs"]
    given = {n: torch.full((len(s),), 5.0) for n, s in net.sites.items()}
    given["layers.depth"] = torch.tensor([3.0, 1.0, 2.0])
    cut = pn.prune_once(net, pn.Budget(macs=0.75), scores=given, scope=scope)
    assert cut["layers.depth"] == 1
    assert net.sites["layers.depth"].open.tolist() == [True, False, True]
    assert present(net)["macs"] <= 0.75 * before
    small, x = net.compact(), torch.randn(3, 4)
    assert not list(small.layers[1].parameters())
    torch.testing.assert_close(small(x), net.eval()(x))


def test_closed_units_go_first() -> None:
    net = PlasticNet(mlp(4, 8, 3), (torch.randn(2, 4),))
    with torch.no_grad():
        net.model[0].weight[:3] *= 100
        net.sites["0"].phi[:3] = -1.0
    assert pn.prune_once(net, pn.Budget(units=4)) == {"0": 1}
    assert net.sites["0"].open.tolist() == [True] * 4


def test_errors_change_nothing() -> None:
    net, optimizer, loss = trained()
    before = everything(net, optimizer)
    good = pn.scores(net, "magnitude")
    bad: list[tuple[str, Any]] = [
        ("cannot be met", {"budget": pn.Budget(macs=1.5)}),
        ("cannot be met", {"budget": pn.Budget(macs=1.5), "scope": "uniform"}),
        ("a budget of costs", {"budget": pn.Budget(loss=0.1)}),
        ("a budget of costs", {"budget": 0.3}),
        ("global, uniform", {"scope": "local"}),
        ("fisher, repair, magnitude, taylor, gate", {"scores": "size"}),
        ("fisher, repair, magnitude, taylor, gate", {"scores": "none"}),
        ("need a loss", {"scores": "gate"}),
        ("not finite", {"scores": "gate", "loss": lambda: loss() * math.nan}),
        ("site 'fc1'", {"scores": {n: s for n, s in good.items() if n != "fc1"}}),
        ("site 'fc1'", {"scores": {**good, "fc1": torch.ones(3)}}),
        ("site 'fc1'", {"scores": {**good, "fc1": good["fc1"] * math.nan}}),
        ("optimizer", {"optimizer": Adam(net.model.parameters())}),
    ]
    for message, change in bad:
        with pytest.raises(PlasticError, match=message):
            pn.prune_once(**{"net": net, "budget": pn.Budget(macs=0.5), "optimizer": optimizer, **change})
        assert_same(everything(net, optimizer), before)
    net.k = 7.0
    with pytest.raises(PlasticError, match="k is 7"):
        pn.prune_once(net, pn.Budget(macs=0.5), optimizer)


# -- sensitivity ------------------------------------------------------------------------------


def test_losses_are_those_of_closing_by_hand() -> None:
    net, _, loss = trained()
    found = pn.sensitivity(net, lambda n: loss().mean().item(), (0.2, 0.5), "taylor", loss)
    worth = pn.scores(net, "taylor", loss)
    net.eval()
    assert found.loss == loss().mean().item()
    for row in found.sites:
        site = net.sites[row.name]
        assert row.units == len(site)
        assert row.closed == (round(0.2 * len(site)), round(0.5 * len(site)))
        for n, value in zip(row.closed, row.losses, strict=True):
            with torch.no_grad():
                site.phi[worth[row.name].argsort()[:n]] = -1.0
                assert loss().mean().item() == pytest.approx(value, rel=1e-9)
                site.phi.fill_(1.0)
    assert found.sites[0].losses[1] != found.loss


@pytest.mark.parametrize("k", [math.inf, 7.0])
def test_the_network_is_what_it_was(k: float) -> None:
    net, optimizer, loss = trained(ConvNet(dropout=0.5))
    net.k = 7.0
    train_step(net, optimizer, images(12).double())
    randomise_gates(net)
    net.sites["fc1"].grace[1] = 3
    net.k = k
    net.train()
    net.model.bn1.eval()
    before = everything(net, optimizer)

    def evaluate(n: PlasticNet) -> float:
        assert n is net
        assert not any(m.training for m in n.modules())
        assert not torch.is_grad_enabled()
        n.train()
        torch.rand(3)
        return loss().mean().item()

    pn.sensitivity(net, evaluate, scores="gate", loss=loss)
    assert_same(everything(net, optimizer), before)

    def failing(n: PlasticNet) -> float:
        if not all(s.open.all() for s in n.sites.values()):
            raise RuntimeError("in the middle")
        return 0.0

    with pytest.raises(RuntimeError, match="in the middle"):
        pn.sensitivity(net, failing)
    assert_same(everything(net, optimizer), before)


def test_all_other_units_are_open_and_one_stays() -> None:
    net, _, _ = trained()
    randomise_gates(net)
    seen: list[list[int]] = []

    def evaluate(n: PlasticNet) -> float:
        seen.append([int((~s.open).sum()) for s in n.sites.values()])
        return 0.0

    found = pn.sensitivity(net, evaluate, (0.01, 0.5, 0.99))
    assert seen[0] == [0] * len(net.sites)
    assert all(sum(c > 0 for c in closed) == 1 for closed in seen[1:])
    for i, row in enumerate(found.sites):
        assert row.closed == (0, round(0.5 * row.units), row.units - 1)
        assert {c[i] for c in seen} == set(row.closed)


def test_blocks_may_all_close() -> None:
    net = PlasticNet(InOrder(), (torch.randn(2, 4),), blocks=("layers.?",))
    x = torch.randn(3, 4)
    found = pn.sensitivity(net, lambda n: n(x).square().mean(), (0.9,))
    (row,) = (s for s in found.sites if s.name == "layers.depth")
    assert row.closed == (3,)
    m = net.model
    assert row.losses[0] == pytest.approx(m.head(m.stem(x)).square().mean().item())


def test_it_prints_and_turns_into_json() -> None:
    net, _, _ = trained()
    values = iter(i / 100 for i in range(100))
    found = pn.sensitivity(net, lambda _: next(values), (0.25, 0.5))
    assert json.loads(json.dumps(found.as_dict()))["sites"][0] == {
        "name": "conv1", "units": 6, "closed": [2, 3], "losses": [0.01, 0.02],
    }  # fmt: skip
    head, columns, *rows = str(found).splitlines()
    assert "all open: 0" in head
    assert columns.split() == ["site", "units", "25", "%", "50", "%"]
    assert rows[0].split() == ["conv1", "6", "0.01", "0.02"]
    assert len(rows) == len(net.sites)


def test_what_sensitivity_refuses() -> None:
    net, _, _ = trained()
    for shares in ((), (0.0,), (1.0,), (math.nan,)):
        with pytest.raises(PlasticError, match="between 0 and 1"):
            pn.sensitivity(net, lambda _: 0.0, shares)
    with pytest.raises(PlasticError, match="evaluate returned None"):
        pn.sensitivity(net, lambda _: None)  # pyright: ignore[reportArgumentType]


# -- the example ------------------------------------------------------------------------------


@pytest.mark.slow
@heavy
def test_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way meets its budget and is not far from the dense network in the end."""
    path = Path(__file__).parents[2] / "examples" / "from_trained.py"
    monkeypatch.syspath_prepend(path.parent)
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    found = re.findall(r"^ +(\d+)% .* (\d+\.\d+)% +([\d,]+)  \d+-\d+-\d+$", out, re.MULTILINE)
    (_, dense, whole), *rows = [
        (int(share), float(accuracy), int(macs.replace(",", ""))) for share, accuracy, macs in found
    ]
    assert len(rows) == 12
    for share, accuracy, macs in rows:
        assert macs <= share / 100 * whole
        assert accuracy > dense - 12
