"""Fisher scores: their definition, without labels, by cost; losses without a gradient; Taylor counted once."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet
from plasticnet.apps.data import load_data
from tests.kit.blocks import InOrder
from tests.kit.networks import ConvNet, images, mlp
from tests.oneshot.test_scores import derivatives, problem


def correlation(a: Tensor, b: Tensor) -> float:
    """The rank correlation."""
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.fixture(scope="module")
def trained() -> tuple[PlasticNet, Tensor, Tensor]:
    """A small classifier of digits, and what it was trained on."""
    torch.manual_seed(0)
    data = load_data("digits")
    x, y = data.train.x, data.train.y
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(x[0].numel(), 60), nn.ReLU(), nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 10)
    )
    optimizer = Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return PlasticNet(model, (x[:2],)), x, y


# -- what they are ----------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["conv1", "conv3", "fc1"])
def test_fisher_is_half_the_mean_square_of_each_samples_derivative(site: str) -> None:
    net, loss = problem()
    expected = derivatives(net, loss, site).square().mean(1) / 2
    torch.testing.assert_close(pn.scores(net, "fisher", loss)[site], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("options", [{"gates": "batch"}, {"blocks": ("layers.?",)}])
def test_samples_that_share_gates_have_the_same_fisher_apart_from_noise(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model, x = InOrder(), torch.randn(400, 4)
    net, loss = problem(model, x, **options)
    name = next(n for n in net.sites if n.endswith("up"))
    found, exact = pn.scores(net, "fisher", loss)[name], derivatives(net, loss, name).square().mean(1) / 2
    assert 0.5 < float(found.sum() / exact.sum()) < 2  # the square of the mean loss would be hundreds of times less


def test_without_labels_units_rank_as_with_labels(trained: tuple[PlasticNet, Tensor, Tensor]) -> None:
    net, x, y = trained
    truth = pn.scores(net, "fisher", lambda: F.cross_entropy(net(x), y, reduction="none"))
    for batches in ([x], list(x.split(100)), [(x, y)], [{"input": x, "labels": y}]):
        found = pn.scores(net, batches=batches)
        assert all(correlation(found[n], truth[n]) > 0.9 for n in net.sites)
    again, once = pn.scores(net, batches=[x]), pn.scores(net, batches=[x])
    assert all(torch.equal(again[n], once[n]) for n in net.sites)


def test_the_classes_are_drawn_from_the_models_own() -> None:
    """Over many draws of inputs the mean is the Fisher information: that of every class, by its probability."""
    torch.manual_seed(0)
    x = torch.randn(3, 4).double()
    net = PlasticNet(mlp(4, 6, 3).double(), (x,))
    net.eval()
    p = net(x).softmax(1).detach()
    exact = torch.zeros(6).double()
    for c in range(3):
        each = derivatives(net, lambda c=c: F.cross_entropy(net(x), torch.full((3,), c), reduction="none"), "0")
        exact += (each.square() * p[:, c]).mean(1) / 2
    found = pn.scores(net, batches=[x.repeat(600, 1)])["0"]
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0)


def test_outputs_that_are_no_classes_have_the_fisher_of_a_normal_distribution() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.a(x).tanh()
            return {"one": self.b(h), "several": 100 * self.c(h)[:, None]}

    torch.manual_seed(0)
    x = torch.randn(5, 4).double()
    net = PlasticNet(Two().double(), (x,))
    net.eval()
    exact = torch.zeros(6).double()
    for key in ("one", "several"):
        y = net(x)[key].detach().flatten(1)
        for j in range(y.shape[1]):
            each = derivatives(net, lambda j=j, key=key: net(x)[key].flatten(1)[:, j], "a")
            exact += each.square().mean(1) / 2 / y.var(correction=0)
    found = pn.scores(net, batches=[x.repeat(600, 1)])["a"]
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0)
    first = pn.scores(net, batches=[x], outputs=lambda y: y["one"])["a"]
    assert first.shape == (6,)


def test_forward_runs_what_fits_no_other_form() -> None:
    x = torch.randn(20, 4)
    net = PlasticNet(mlp(4, 6, 3), (x[:2],))
    found = pn.scores(net, batches=[{"mine": x}], forward=lambda net, batch: net(batch["mine"]))
    assert torch.equal(found["0"], pn.scores(net, batches=[x])["0"])
    with pytest.raises(PlasticError, match="only once"):
        pn.scores(net, batches=iter([x]))
    with pytest.raises(PlasticError, match="inputs without labels"):
        pn.scores(net)
    with pytest.raises(PlasticError, match="no batches"):
        pn.scores(net, batches=[])


# -- a loss at its minimum --------------------------------------------------------------------

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divergence": lambda y, t: F.kl_div(y.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1),
    "squares": lambda y, t: (y - t).square().mean(1),
    "cosine": lambda y, t: 1 - F.cosine_similarity(y, t),
    "mean": lambda y, t: F.mse_loss(y, t),
}


@pytest.mark.parametrize("kind", ["fisher", "gate", "taylor"])
@pytest.mark.parametrize("which", LOSSES)
def test_a_loss_at_its_minimum_is_named(which: str, kind: str, trained: tuple[PlasticNet, Tensor, Tensor]) -> None:
    net, x, _ = trained
    net.eval()
    with torch.no_grad():
        taught = torch.cat([net(part) for part in x.split(7)])  # which differs by rounding
    for target in (taught, net(x).detach()):
        with pytest.raises(PlasticError, match="at its minimum"):
            pn.scores(net, kind, lambda target=target: LOSSES[which](net(x), target))


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e6])
def test_a_small_loss_is_no_minimum(scale: float, trained: tuple[PlasticNet, Tensor, Tensor]) -> None:
    net, x, y = trained
    found = pn.scores(net, "gate", lambda: scale * F.cross_entropy(net(x), y, reduction="none"))
    whole = pn.scores(net, "gate", lambda: F.cross_entropy(net(x), y, reduction="none"))
    for name in net.sites:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-2, atol=1e-3)


# -- by cost ----------------------------------------------------------------------------------


def test_the_default_goes_by_value_per_cost_of_the_budget() -> None:
    """Of two sites whose units bring the same, the dearer one is cut; in another cost they are equal."""
    torch.manual_seed(0)
    x = torch.randn(300, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    cut = dict[str, set[str]]()
    for cost in ("macs", "units"):
        net = PlasticNet(deepcopy(model), (x[:2],))
        equal = {n: torch.ones(len(s)) for n, s in net.sites.items()}
        cut[cost] = set(pn.prune_once(net, pn.Budget(**{cost: 0.7}), scores=equal, per_cost=True))
    assert cut == {"macs": {"0"}, "units": {"0", "4"}}


def test_pruning_with_data_is_by_fisher_and_without_by_magnitude(trained: tuple[PlasticNet, Tensor, Tensor]) -> None:
    net, x, _ = trained
    given = pn.scores(net, batches=[x])
    nets = [deepcopy(net) for _ in range(4)]
    pn.prune_once(nets[0], pn.Budget(macs=0.5), batches=[x])
    pn.prune_once(nets[1], pn.Budget(macs=0.5), scores=given, per_cost=True)
    assert torch.equal(nets[0].model[5].weight, nets[1].model[5].weight)
    pn.prune_once(nets[2], pn.Budget(macs=0.5))
    pn.prune_once(nets[3], pn.Budget(macs=0.5), scores="magnitude")
    assert torch.equal(nets[2].model[5].weight, nets[3].model[5].weight)
    assert not torch.equal(nets[0].model[5].weight, nets[2].model[5].weight)


def test_units_may_be_closed_only_and_cut_later(trained: tuple[PlasticNet, Tensor, Tensor]) -> None:
    net, x, _ = trained
    one, two = deepcopy(net), deepcopy(net)
    cut = pn.prune_once(one, pn.Budget(macs=0.5), batches=[x])
    assert pn.prune_once(two, pn.Budget(macs=0.5), batches=[x], cut=False) == cut
    assert {n: len(s) for n, s in two.sites.items()} == {n: len(s) for n, s in net.sites.items()}
    one.eval()
    two.eval()
    torch.testing.assert_close(two(x), one(x))
    assert two.prune() == cut


# -- taylor counts once -----------------------------------------------------------------------


class Chain(nn.Module):
    """A convolution, a norm, a depthwise convolution and a norm again: one unit passes all of them."""

    def __init__(self, depthwise: bool, bias: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 1, groups=6, bias=False) if depthwise else nn.Identity()
        self.bn2 = nn.BatchNorm2d(6) if depthwise else nn.Identity()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        return self.fc(self.bn2(self.depthwise(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_taylor_counts_a_convolution_and_its_norm_once(depthwise: bool, bias: bool) -> None:
    """Scale and shift of the last norm are all of the unit behind a ReLU, so Taylor is the derivative of its gate."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, 5, 5).double(), torch.arange(20) % 3
    model = Chain(depthwise, bias).double()
    for norm in (model.bn, model.bn2):
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)
    net = PlasticNet(model, (x[:2],))
    found = [pn.scores(net, kind, lambda: F.cross_entropy(net(x), y))["conv"] for kind in ("taylor", "gate")]
    torch.testing.assert_close(found[0], found[1])


def test_taylor_counts_all_producers_of_a_sum() -> None:
    net = PlasticNet(ConvNet().double(), (images(4).double(),))
    x, y = images(12).double(), torch.arange(12) % 3
    net.eval()
    found = pn.scores(net, "taylor", lambda: F.cross_entropy(net(x), y))["conv1"]
    F.cross_entropy(net(x), y).backward()
    m = net.model
    parts = [m.bn1.weight, m.bn1.bias, m.conv2.weight, m.conv2.bias]
    total = sum((p.grad * p).reshape(6, -1).sum(1) for p in parts)
    torch.testing.assert_close(found, total.square().div(total.square().mean()).sqrt().detach())


@pytest.mark.parametrize("kind", ["fisher", "repair", "magnitude"])
def test_scores_that_were_returned_do_what_their_name_does(kind: str) -> None:
    """They know their kind, so that those that are divided by costs are so, too; a plain dict of them is not."""
    torch.manual_seed(0)
    x = images(60).double()
    nets = [PlasticNet(ConvNet().double(), (x[:2],)) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    batches = x.split(20)
    found = pn.scores(nets[0], kind, batches=1 if kind == "magnitude" else batches)
    by_name = {} if kind == "magnitude" else {"batches": batches}
    closed = [
        pn.prune_once(nets[0], pn.Budget(macs=0.4), scores=kind, **by_name),
        pn.prune_once(nets[1], pn.Budget(macs=0.4), scores=found),
        pn.prune_once(nets[2], pn.Budget(macs=0.4), scores=dict(found), per_cost=kind != "magnitude"),
    ]
    assert closed[0] == closed[1] == closed[2]
