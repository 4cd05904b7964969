"""Single weights in scores and in a cut at once: exact where it can be enumerated, and by the rule of units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet
from tests.kit.networks import assert_same


def small() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network in double precision, inputs and labels."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    return model, x, torch.randint(3, (40,))


def own_squares(net: PlasticNet, losses: Tensor) -> dict[str, Tensor]:
    """Half the mean square of entry times gradient, from the gradient of every sample by itself."""
    weights = {name: net.model.get_parameter(name) for name in net.weights}
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for f in losses:
        found = torch.autograd.grad(f, list(weights.values()), retain_graph=True)
        for (name, w), g in zip(weights.items(), found, strict=True):
            total[name] += (w.detach() * g).square() / (2 * len(losses))
    return total


def test_fisher_of_a_loss_is_the_mean_square_of_samples_in_expectation() -> None:
    model, x, y = small()
    net = PlasticNet(model, (x,), weights=["0", "2"], exclude=["*"])

    def loss() -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    found, wanted = pn.scores(net, "fisher", loss, batches=1), own_squares(net, loss())
    assert set(found) == {"0.weight", "2.weight"}
    for name, right in wanted.items():  # eight draws of signs: close for sums over many entries
        assert found[name].sum().item() == pytest.approx(right.sum().item(), rel=0.5)
        assert torch.corrcoef(torch.stack([found[name].flatten(), right.flatten()]))[0, 1] > 0.8
    one = pn.scores(net, "fisher", lambda: F.cross_entropy(net(x[:1]), y[:1], reduction="none"))
    exact = own_squares(net, F.cross_entropy(net(x[:1]), y[:1], reduction="none"))
    for name, right in exact.items():  # a single sample has no signs to average over
        assert torch.allclose(one[name].double(), right, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fisher", "magnitude", "taylor", "gate", "repair"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("budget", [{"params": 0.4}, {"macs": 0.3}])
def test_the_budget_is_met_by_units_and_entries(kind: str, alone: bool, budget: dict[str, float]) -> None:
    model, x, y = small()
    net = PlasticNet(model, (x,), weights=["0", "2"], exclude=["*"] if alone else [])
    given: dict[str, Any] = {"loss": lambda: F.cross_entropy(net(x), y, reduction="none")}
    if kind in ("repair", "magnitude"):
        given = {"batches": x.split(10)} if kind == "repair" else {}
    size = net.summary()
    limit = budget.get("params", 0) * size.open_parameters or budget["macs"] * size.open_macs
    pn.prune_once(net, pn.Budget(**budget), scores=kind, **given)
    size = net.summary()
    spent = size.open_parameters if "params" in budget else size.open_macs
    assert 0.9 * limit <= spent <= limit
    compact = net.compact()
    assert_same(compact(x), net.eval()(x))
    if "params" in budget:
        assert sum(int((p != 0).sum()) for p in compact.parameters()) <= limit


def test_the_entries_of_least_worth_close() -> None:
    model, x, _ = small()
    net = PlasticNet(model, (x,), weights=["2"], exclude=["*"])
    with torch.no_grad():
        worth = torch.arange(18.0).view(3, 6)
    pn.prune_once(net, pn.Budget(params=(model[0].weight.numel() + 6 + 3 + 7) / 57), scores={"2.weight": worth})
    assert net.weights["2.weight"].open.flatten().tolist() == [False] * 11 + [True] * 7


def test_closed_entries_score_nothing_and_frozen_ones_are_scored() -> None:
    model, x, y = small()
    model[2].weight.requires_grad_(False)
    net = PlasticNet(model, (x,), weights=["2"])
    with torch.no_grad():
        net.weights["2.weight"].phi[0, :3] = -1.0
    for kind in ("fisher", "magnitude", "gate"):
        found = pn.scores(net, kind, lambda: F.cross_entropy(net(x), y, reduction="none"))["2.weight"]
        assert (found[0, :3] == 0).all()
        assert (found[1] > 0).all()
    assert not model[2].weight.requires_grad


def test_an_error_leaves_entries_as_they_were() -> None:
    model, x, _ = small()
    net = PlasticNet(model, (x,), weights=["2"])
    before = copy.deepcopy(net.state_dict())
    stranger = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(PlasticError):
        pn.prune_once(net, pn.Budget(params=0.3), stranger, scores="magnitude")
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    with pytest.raises(PlasticError, match=r"2\.weight.*shape"):
        pn.prune_once(net, pn.Budget(params=0.3), scores={"0": torch.ones(6), "2.weight": torch.ones(3)})


def test_single_weights_without_scores_stay_as_they_are() -> None:
    model, x, _ = small()
    net = PlasticNet(model, (x,), weights=["0", "2"])
    with torch.no_grad():
        net.weights["2.weight"].phi[0, 5] = -1.0
    pn.prune_once(net, pn.Budget(units=0.5), scores={"0": torch.arange(6.0)})
    assert [int(w.open.sum()) for w in net.weights.values()] == [15, 8]
    with pytest.raises(PlasticError, match=r"0\.weight"):
        pn.prune_once(net, pn.Budget(units=0.5), scores={"0": torch.ones(3), "2.weight": torch.ones(3, 3)})


def test_batches_for_entries_are_checked_as_those_for_units() -> None:
    model, x, _ = small()
    net = PlasticNet(model, (x,), weights=["2"], exclude=["*"])
    with pytest.raises(PlasticError, match="read only once"):
        pn.scores(net, "fisher", batches=iter(x.split(10)))
    with pytest.raises(PlasticError, match="no batches to read"):
        pn.scores(net, "fisher", batches=[])
