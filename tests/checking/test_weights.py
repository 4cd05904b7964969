"""Gates on single weights: unbiased, exact in every limit, and what is closed is zero."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from plasticnet import ESTIMATORS, Budget, PlasticError, PlasticNet, Schedule, Stage, prune_once
from plasticnet.gates.site import INITIAL_LOGIT, OPEN_LOGIT, probabilities
from tests.kit.networks import ConvNet, assert_same, images, mlp, train_step


def randomise(net: PlasticNet, spread: float = 1.0) -> None:
    with torch.no_grad():
        for g in net.all_gates():
            g.phi.copy_(spread * torch.randn_like(g.phi))


def adam(net: PlasticNet) -> torch.optim.Adam:
    return torch.optim.Adam(net.param_groups(1e-2))


def nonzero(model: nn.Module) -> int:
    """Parameters, less the zeros of weights."""
    return sum(int((p != 0).sum()) if p.dim() > 1 else p.numel() for p in model.parameters())


# -- which weights ----------------------------------------------------------------------------


class Odd(nn.Module):
    """A table, a weight that two layers share, a computed one, and two that are as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.normed = weight_norm(nn.Linear(4, 6))
        self.norm = nn.LayerNorm(6)
        self.plain, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.table(x)).tanh())
        return self.last(self.plain(self.norm(self.normed(x))).relu())


def test_which_weights() -> None:
    net = PlasticNet(Odd(), (torch.arange(6),), weights="*")
    assert list(net.weights) == ["plain.weight", "last.weight"]
    for name, reason in {
        "table.weight": "a table", "first.weight": "shared: first.weight, second.weight", "normed.weight": "computed",
    }.items():  # fmt: skip
        assert reason in net.frozen[name]
    assert not any(n.startswith("norm.") for n in net.frozen)  # vectors are no matter of weights
    phi = net.weights["plain.weight"].phi
    assert phi.shape == (5, 6)
    assert bool((phi == INITIAL_LOGIT).all())
    assert not PlasticNet(mlp(4, 5, 3), (torch.randn(2, 4),)).weights


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(PlasticError, match=r"weights='fc' matches no module .* these have one: 0, 2"):
        PlasticNet(mlp(4, 5, 3), (torch.randn(2, 4),), weights=("0", "fc"))
    with pytest.raises(PlasticError, match="weights='bn1'"):
        PlasticNet(ConvNet(), (images(),), weights="bn1")


class Elsewhere(nn.Module):
    """Reads a weight in a way that the gates do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.__dict__["kept"] = [self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).tanh(), self.b.weight, self.b.bias) + self.kept[0].sum()


def test_a_weight_that_is_read_elsewhere_too() -> None:
    model = Elsewhere()
    net = PlasticNet(model, (torch.randn(2, 4),), weights="*")
    assert list(net.weights) == ["a.weight"]
    assert "something else reads it" in net.frozen["b.weight"]


def test_weights_without_units() -> None:
    with pytest.raises(PlasticError, match="nothing to gate"):
        PlasticNet(nn.Sequential(nn.Embedding(4, 3)), (torch.arange(3),), weights="*")
    net = PlasticNet(nn.Linear(4, 3), (torch.randn(2, 4),), weights="*")
    assert not net.sites
    assert list(net.weights) == ["weight"]
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),), weights="*", exclude="*")
    net.k = 3.0
    assert not net.sites
    train_step(net, adam(net))
    net.eval()
    assert net.resize({}) is None
    assert net.prune() == {}
    assert "parameters" in str(net.summary())
    assert net.penalty(1.0, "units").item() == 0.0
    net.k = math.inf
    before = net.summary().open_parameters
    assert prune_once(net, Budget(params=0.5)) == {}
    assert net.summary().open_parameters == before // 2


# -- the gradient -----------------------------------------------------------------------------


def problem(units: bool) -> tuple[PlasticNet, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        model[2].weight.mul_(4)
    net = PlasticNet(model, (x,), weights="2", exclude=() if units else "*")
    net.k = 2.0
    with torch.no_grad():
        net.weights["2.weight"].phi.copy_(torch.tensor([[-0.5, -0.2, 0.0], [0.3, 0.5, 0.9]]))
        for site in net.sites.values():
            site.phi.copy_(torch.tensor([0.4, -0.3, 0.1]))
    return net, x, y


def exact_gradient(net: PlasticNet, x: Tensor, y: Tensor) -> Tensor:
    """d/dphi of the sum over all patterns of p(z) f(z), of units and weights, with f by hand."""
    phi = net.phi().detach().clone().requires_grad_()
    pi, (first, act, last) = torch.sigmoid(net.k * phi), net.model
    units = sum(len(s) for s in net.sites.values())
    total = torch.zeros(())
    for pattern in itertools.product([0.0, 1.0], repeat=len(phi)):
        z = torch.tensor(pattern)
        hidden = act(first(x)) * (z[:units] if units else 1.0)
        f = F.cross_entropy(F.linear(hidden, last.weight * z[units:].view(2, 3), last.bias), y).detach()
        total = total + (pi * z + (1 - pi) * (1 - z)).prod() * f
    return torch.autograd.grad(total, phi)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "units"),
    [(n, True) for n, e in sorted(ESTIMATORS.items()) if not e.biased] + [("bitflip-cv", False), ("disarm", False)],
)
def test_unbiased(name: str, units: bool) -> None:
    net, x, y = problem(units)
    net.sampler.estimator = name
    exact = exact_gradient(net, x, y)
    net.train()
    steps, found = 1200 if name == "ar" else 600, []  # "ar" has the most noise
    for _ in range(steps):
        loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [g.phi for g in net.all_gates()])]))
    stacked = torch.stack(found)
    error = stacked.std(0) / steps**0.5
    assert ((stacked.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all()
    assert error.median() < exact.abs().max() / 4  # noise does not hide the gradient


def test_one_kind_is_flipped_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per sample the units, or one weight for all."""
    net, x, y = problem(True)
    net.train()
    seen: list[tuple[bool, bool]] = []
    gates = ESTIMATORS[net.sampler.estimator].gates
    object.__setattr__(
        ESTIMATORS[net.sampler.estimator],
        "gates",
        lambda d, i: seen.append((len(d.pi) == 3, d.chosen is None)) or gates(d, i),
    )
    try:
        for _ in range(30):
            net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")).backward()
    finally:
        object.__setattr__(ESTIMATORS[net.sampler.estimator], "gates", gates)
    units = [stays for of_units, stays in seen if of_units]
    weights = [stays for of_units, stays in seen if not of_units]
    assert units == [not stays for stays in weights]
    assert 5 < sum(units) / 2 < 25


def test_what_a_budget_measures_is_the_whole_gradient() -> None:
    net, x, y = problem(True)
    net.train()
    (5 * net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none"))).backward()
    gradient = torch.cat([g.phi.grad.flatten() for g in net.all_gates() if g.phi.grad is not None])
    assert net.sampler.gradient is not None
    torch.testing.assert_close(5 * net.sampler.gradient, gradient)


# -- limits -----------------------------------------------------------------------------------


def test_infinite_k_is_ordinary_training() -> None:
    model, x, y = ConvNet(), images(6), torch.arange(6) % 3
    plain = copy.deepcopy(model)
    net = PlasticNet(model, (x,), weights="*")
    for m in (net, plain):
        m.train()
        torch.manual_seed(1)
        F.cross_entropy(m(x), y).backward()
    assert_same([p.grad for p in plain.parameters()], [p.grad for p in net.model.parameters()])
    assert all(w.phi.grad is None for w in net.weights.values())
    net.k = 3.0
    train_step(net, adam(net), torch.randn(6, 3, 4, 4))
    assert all(w.phi.grad is not None and bool(w.phi.grad.any()) for w in net.weights.values())
    net.k = math.inf
    assert all(w.phi.grad is None for w in net.weights.values())


def test_closed_weights_stay_zeros_at_infinite_k() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),), weights="*")
    optimizer = adam(net)
    randomise(net)
    closed = {n: ~w.open for n, w in net.weights.items()}
    before = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    for _ in range(3):
        train_step(net, optimizer)
    for name, p in net.model.named_parameters():
        if name in closed:
            assert torch.equal(p[closed[name]], before[name][closed[name]])
            assert not torch.equal(p[~closed[name]], before[name][~closed[name]])
            assert torch.equal(~net.weights[name].open, closed[name])


def test_k_zero_is_drop_connect() -> None:
    net = PlasticNet(nn.Linear(40, 30, bias=False), (torch.randn(2, 40),), weights="*")
    net.k = 0.0
    net.eval()
    x = torch.randn(3, 40)
    torch.testing.assert_close(net(x), 0.5 * net.model(x))
    net.train()
    drawn = net(torch.eye(40)).T
    assert bool(((drawn == 0) | (drawn == net.model.weight)).all())
    assert 0.4 < float((drawn == 0).double().mean()) < 0.6


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    k=st.sampled_from([0.0, 0.7, 7.0, math.inf]),
    inputs=st.booleans(),
    units=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_compact_equals_evaluation(widths: list[int], k: float, inputs: bool, units: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = mlp(*widths, 3).double(), torch.randn(7, widths[0], dtype=torch.float64)
    net = PlasticNet(model, (x,), weights="*", exclude=() if units else "*", inputs=["2"] if inputs else [])
    net.k = k
    randomise(net)
    net.eval()
    small = net.compact()
    assert (small(x) - net(x)).abs().max().item() <= 1e-9
    if not units:
        assert nonzero(small) == net.summary().open_parameters


@pytest.mark.parametrize("options", [{}, {"inputs": ["fc1"]}, {"exclude": ["fc1"]}])
@pytest.mark.parametrize("k", [2.0, math.inf])
def test_compact_of_convolutions(options: dict[str, list[str]], k: float) -> None:
    x = images().double()
    net = PlasticNet(ConvNet().double(), (x,), weights=("conv*", "fc*"), **options)  # pyright: ignore[reportArgumentType]
    net.k = k
    randomise(net)
    net.eval()
    assert (net.compact()(x) - net(x)).abs().max().item() <= 1e-9


# -- size -------------------------------------------------------------------------------------


def test_units_that_no_weight_reads_are_cut_at_infinite_k() -> None:
    x = torch.randn(5, 4)
    net = PlasticNet(mlp(4, 6, 5, 3), (x,), weights=("2", "4"))
    with torch.no_grad():
        net.weights["4.weight"].phi[:, 1] = -1.0  # nothing reads unit 1 of "2" ...
        net.weights["2.weight"].phi[[0, 2, 3, 4], 3] = -1.0  # ... and nothing else unit 3 of "0"
        net.weights["2.weight"].phi[2, 5] = -1.0
    net.eval()
    before = net(x)
    assert [m.out_features for m in net.compact() if isinstance(m, nn.Linear)] == [5, 4, 3]
    net.k = 5.0
    assert net.prune() == {}  # they may come back
    net.k = math.inf
    assert net.prune() == {"0": 1, "2": 1}
    torch.testing.assert_close(net(x), before)
    assert net.weights["2.weight"].phi.shape == (4, 5)
    assert int((~net.weights["2.weight"].open).sum()) == 1
    assert net.summary().open_parameters == nonzero(net.compact())


def test_a_site_that_nothing_reads_keeps_a_unit() -> None:
    x = torch.randn(5, 4)
    net = PlasticNet(mlp(4, 6, 3), (x,), weights=("2",))
    with torch.no_grad():
        net.weights["2.weight"].phi.fill_(-1.0)
    net.eval()
    before = net(x)
    torch.testing.assert_close(net.compact()(x), before)
    assert net.prune() == {"0": 5}
    torch.testing.assert_close(net(x), before)


def test_resize_keeps_pairs() -> None:
    """Every logit stays with its weight, and with its optimizer state; new ones are open."""
    net = PlasticNet(ConvNet(), (images(),), weights="*", inputs=["fc1"])
    optimizer = adam(net)
    net.k = 4.0
    train_step(net, optimizer, torch.randn(6, 3, 4, 4))
    with torch.no_grad():
        for name, w in net.weights.items():
            p = net.model.get_parameter(name)
            w.phi.copy_(p)
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[w.phi][key].copy_(p)
                optimizer.state[p][key].copy_(p)
    net.resize({"conv1": [0, -1, 2, 4, 5], "conv3": [1, 3], "fc1": [*range(3), -1, -1]}, optimizer)
    changed = 0
    for name, w in net.weights.items():
        p = net.model.get_parameter(name)
        assert w.phi.shape == p.shape
        old = w.phi != OPEN_LOGIT / 4.0
        changed += int((~old).sum())
        assert torch.equal(w.phi[old], p[old])
        assert torch.equal(optimizer.state[w.phi]["exp_avg"][old], optimizer.state[p]["exp_avg"][old])
    assert changed
    assert {id(g.phi) for g in net.all_gates()} == {id(p) for p in optimizer.param_groups[1]["params"]}
    train_step(net, optimizer, torch.randn(6, 3, 4, 4))


def test_going_on_equals_never_stopping() -> None:
    def build() -> tuple[PlasticNet, torch.optim.Adam, Schedule]:
        torch.manual_seed(5)
        net = PlasticNet(mlp(4, 8, 6, 3), (torch.randn(2, 4),), weights="*")
        optimizer = adam(net)
        stages = [Stage(1), Stage(6, k=7.0), Stage(2)]
        return net, optimizer, Schedule(net, optimizer, stages, budget=Budget(params=0.3))

    def epochs(net: PlasticNet, optimizer: torch.optim.Adam, schedule: Schedule, n: int) -> None:
        for _ in range(n):
            for _ in range(4):
                x = torch.randn(6, 4)
                net.train()
                loss = net.expected_loss(lambda x=x: F.cross_entropy(net(x), torch.arange(6) % 3, reduction="none"))
                optimizer.zero_grad()
                (loss + schedule.penalty()).backward()
                optimizer.step()
            schedule.step()

    whole = build()
    epochs(*whole, 9)
    begun = build()
    epochs(*begun, 5)
    states, rng = [copy.deepcopy(part.state_dict()) for part in begun], torch.get_rng_state()
    resumed = build()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(rng)
    epochs(*resumed, 4)
    assert_same([part.state_dict() for part in whole], [part.state_dict() for part in resumed])
    with pytest.raises(PlasticError, match="another architecture"):
        PlasticNet(mlp(4, 8, 6, 3), (torch.randn(2, 4),)).load_state_dict(states[0])
    wrong = dict(states[0])
    wrong["gates.weight/0/weight.phi"] = torch.zeros(2, 2)
    with pytest.raises(PlasticError, match=r"gates.weight/0/weight.phi has shape \(2, 2\)"):
        build()[0].load_state_dict(wrong)


# -- cost -------------------------------------------------------------------------------------


class Loop(nn.Module):
    """The rows and the columns of one weight are of the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(1, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + self.b(x).tanh())


def expectation(net: PlasticNet, gated: list[str], uses: dict[str, float]) -> float:
    """Over all patterns of all gates, the parameters that are there, counted one by one."""
    pi = probabilities(net.all_gates(), net.k).detach().double()
    units = sum(len(s) for s in net.sites.values())
    total = 0.0
    for pattern in itertools.product([False, True], repeat=len(pi)):
        z = torch.tensor(pattern)
        masks = dict(zip(net.weights, z[units:].split([w.phi.numel() for w in net.weights.values()]), strict=True))
        there = {n: torch.ones_like(p, dtype=torch.bool) for n, p in net.model.named_parameters()}
        for name, mask in masks.items():
            there[name] &= mask.view(there[name].shape)
        for site, opened in zip(net.sites.values(), z[:units].split([len(s) for s in net.sites.values()]), strict=True):
            for s in site.units.slices:
                for unit, index in zip(opened, s.index, strict=True):
                    if not unit:
                        there[s.tensor].index_fill_(s.dim, torch.from_numpy(index), False)
        total += float(torch.where(z, pi, 1 - pi).prod()) * sum(uses[n] * int(t.sum()) for n, t in there.items())
    assert list(net.weights) == gated
    return total


@pytest.mark.parametrize(
    ("model", "x", "weights"),
    [
        (mlp(2, 2, 3), torch.randn(1, 2), ["2.weight"]),
        (mlp(2, 2, 1), torch.randn(1, 2), ["0.weight", "2.weight"]),
        (Loop(), torch.randn(1, 1), ["a.weight", "b.weight", "c.weight"]),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, (1, 2))), torch.randn(1, 1, 3, 3), ["1.weight"]),
        (nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(4, 2)), torch.randn(1, 1, 2), ["2.weight"]),
    ],
)
def test_cost_by_enumeration(model: nn.Module, x: Tensor, weights: list[str]) -> None:
    net = PlasticNet(model, (x,), weights=[w.removesuffix(".weight") for w in weights])
    net.k = 1.0
    randomise(net)
    for cost, uses in {"parameters": dict.fromkeys(dict(model.named_parameters()), 1.0), "macs": net.uses}.items():
        uses = {n: uses.get(n, 0.0) for n, _ in model.named_parameters()}
        assert net.penalty(1.0, cost).item() == pytest.approx(expectation(net, weights, uses), rel=1e-5)
    net.penalty(1.0, "parameters").backward()
    assert all(w.phi.grad is not None and bool((w.phi.grad > 0).all()) for w in net.weights.values())


def test_cost_of_input_features() -> None:
    """Against a count of what is left, for hard gates."""
    net = PlasticNet(ConvNet(), (images(),), weights=("fc1", "conv2"), inputs=["fc1"])
    randomise(net)
    pi = probabilities(net.all_gates(), math.inf)
    features, channels = net.sites["fc1.input"].open, [net.sites[n].open for n in ("conv1", "conv3")]
    producer = torch.cat(channels).repeat_interleave(4)
    rows = net.sites["fc1"].open[:, None]
    gated = (net.weights["fc1.weight"].open & rows & features & producer).sum()
    site = net.sites["conv1"].open
    gated += (net.weights["conv2.weight"].open & site[:, None, None, None] & site[:, None, None]).sum()
    c1, c3, f1 = int(site.sum()), int(channels[1].sum()), int(net.sites["fc1"].open.sum())
    others = c1 * (27 + 1 + 2 + 1) + c3 * (c1 + 1) + f1 + 3 * f1 + 3  # conv1, bn1, conv2.bias; conv3; fc1.bias; fc2
    assert float(net.cost.expected(pi, "parameters")) == int(gated) + others


# -- schedules and budgets --------------------------------------------------------------------


def run(net: PlasticNet, schedule: Schedule, optimizer: torch.optim.Adam, steps: int = 10) -> None:
    x = torch.randn(60, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    while schedule.epoch < schedule.epochs:
        net.train()
        for i in torch.randperm(60).split(60 // steps):
            loss = net.expected_loss(lambda i=i: F.cross_entropy(net(x[i]), y[i], reduction="none"))
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()


@pytest.mark.slow
@pytest.mark.parametrize("exclude", [(), ("*",)])
@pytest.mark.parametrize("target", [{"params": 0.1}, {"params": 0.3, "macs": 0.2}, {"macs": 0.05}])
def test_budget_is_met(target: dict[str, float], exclude: tuple[str, ...]) -> None:
    net = PlasticNet(mlp(8, 40, 30, 2), (torch.randn(2, 8),), weights="*", exclude=exclude)
    optimizer = torch.optim.Adam(net.param_groups(1e-2, 5e-2))
    budget = Budget(**target)
    targets = budget.targets(net)
    schedule = Schedule(net, optimizer, [Stage(1), Stage(8, k=7.0), Stage(1)], budget=budget)
    run(net, schedule, optimizer)
    summary = net.summary()
    costs = {"parameters": summary.open_parameters, "macs": summary.open_macs}
    assert all(costs[c] <= most for c, most in targets.items())
    assert any(costs[c] >= 0.98 * most for c, most in targets.items())
    small = net.compact()
    assert nonzero(small) == summary.open_parameters
    assert all(bool((p == 0).any()) for p in small.parameters() if p.dim() > 1) or not exclude


def test_budget_of_a_network_that_was_not_trained() -> None:
    """At equal logits the smallest weights go, of every tensor."""
    net = PlasticNet(mlp(8, 40, 30, 2), (torch.randn(2, 8),), weights="*", exclude="*")
    optimizer = adam(net)
    schedule = Schedule(net, optimizer, [Stage(1, k=7.0), Stage(1)], budget=Budget(params=0.5))
    schedule.step()
    assert 0.98 < net.summary().open_parameters / (0.5 * sum(p.numel() for p in net.model.parameters())) <= 1
    for name, w in net.weights.items():
        p = net.model.get_parameter(name).detach().abs()
        assert 0.3 < float(w.open.double().mean()) < 0.7
        assert float(p[w.open].min()) >= float(p[~w.open].max())
    with pytest.raises(PlasticError, match="the target cannot be met"):
        Schedule(net, optimizer, [Stage(1, k=7.0), Stage(1)], budget=Budget(params=10))


def test_stages() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),), weights="*")
    optimizer = adam(net)
    with torch.no_grad():
        net.weights["0.weight"].phi[0] = -1.0
    schedule = Schedule(net, optimizer, [Stage(1), Stage(1, k=6.0), Stage(1)])
    schedule.step()
    phi = net.weights["0.weight"].phi
    assert bool((phi[0] == -1).all())
    assert bool((phi[1:] == OPEN_LOGIT / 6.0).all())
    train_step(net, optimizer)
    assert phi in optimizer.state
    pi = probabilities(net.all_gates(), 6.0).detach()
    assert schedule.step().transition == pytest.approx(float((2 * pi * (1 - pi)).mean()), rel=1e-5)
    assert not any(w.phi in optimizer.state for w in net.weights.values())
    assert {id(w.phi) for w in net.weights.values()} <= {id(p) for p in optimizer.param_groups[1]["params"]}
    assert {"gates.weight/0/weight.phi", "gates.weight/2/weight.phi"} <= set(net._ddp_params_and_buffers_to_ignore)


def test_a_budget_of_loss_goes_back() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),), weights="*")
    optimizer = adam(net)
    schedule = Schedule(net, optimizer, [Stage(1), Stage(4, k=6.0), Stage(1)], budget=Budget(loss=0.1))
    schedule.step(1.0)
    net.train()
    schedule.penalty()
    schedule.step(1.0)
    good = {n: w.phi.detach().clone() for n, w in net.weights.items()}
    randomise(net)
    schedule.step(2.0)
    assert_same(good, {n: w.phi.detach() for n, w in net.weights.items()})
