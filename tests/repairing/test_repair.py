"""Repair: what it reaches, that it is what least squares say, which layers it knows, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet
from plasticnet.repairing.ridge import STRENGTHS
from tests.kit.blocks import InOrder
from tests.kit.networks import ConvNet, assert_same, images, mlp


def close(net: PlasticNet, site: str, *units: int) -> None:
    with torch.no_grad():
        net.sites[site].phi[list(units)] = -1.0


def close_some(net: PlasticNet, share: float = 0.4) -> None:
    """Close the first units of every site."""
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[: min(round(share * len(site)), len(site) - 1)] = -1.0


def outputs(net: PlasticNet, x: Any) -> Tensor:
    net.eval()
    with torch.no_grad():
        return net(x)


def lost(model: nn.Module, x: Tensor, share: float = 0.4, **options: Any) -> tuple[PlasticNet, Tensor]:
    """A network with closed units, and its outputs with all of them open."""
    net = PlasticNet(model, (x[:2],), **options)
    whole = outputs(net, x)
    close_some(net, share)
    return net, whole


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().sum() / (b - b.mean(0)).square().sum())


class Doubled(nn.Module):
    """Every channel and unit is there twice, in other sizes, so that half of them can go without loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding=2)
        self.norm, self.fc1, self.fc2 = nn.BatchNorm2d(8), nn.Linear(8 * 9, 10), nn.Linear(10, 3)
        with torch.no_grad():
            for layer in (self.conv1, self.conv2, self.fc1):
                half = len(layer.weight) // 2
                layer.weight[half:] = 2 * layer.weight[:half]
                layer.bias[half:] = 2 * layer.bias[:half]
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv2(self.conv1(x).relu())).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


def test_units_that_others_can_replace_are_replaced() -> None:
    x = torch.randn(300, 3, 6, 6).double()
    net = PlasticNet(Doubled().double(), (x[:2],))
    whole = outputs(net, x)
    for site in net.sites.values():
        close(net, site.name, *range(len(site) // 2))
    assert far(outputs(net, x), whole) > 1e-2
    found = pn.repair(net, x.split(50))
    assert far(outputs(net, x), whole) < 1e-12
    assert [r.name for r in found.readers] == ["conv2.weight", "fc1.weight", "fc2.weight"]
    assert found.after < 1e-6 < found.before
    torch.testing.assert_close(net.compact()(x), outputs(net, x))


# -- what least squares say -------------------------------------------------------------------


def ridge(h: Tensor, error: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The weights and the constant of a ridge regression with torch.linalg.lstsq, from all activations at once."""
    centre, rest = h.mean(0), error.mean(0)
    scale = (strength * (h - centre).square().mean() * len(h)).sqrt()
    rows = torch.cat([h - centre, scale * torch.eye(h.shape[1]).to(h)])
    change = torch.linalg.lstsq(rows, torch.cat([error - rest, error.new_zeros(h.shape[1], error.shape[1])])).solution
    return change, rest - centre @ change


def test_readers_are_what_ridge_regression_says_one_after_the_other() -> None:
    """The second reader sees what comes out of the first one after its repair, and both aim at the open network."""
    x = torch.randn(400, 6).double()
    model = mlp(6, 12, 10, 4).double()
    net = PlasticNet(model, (x[:2],))
    before = [p.detach().clone() for p in model.parameters()]
    close(net, "0", 1, 5, 7)
    close(net, "2", 0, 9)
    fit = torch.ones(400, dtype=torch.bool).index_fill(0, torch.arange(4, 400, 5), False)
    found = pn.repair(net, [x])
    first, second = (r.strength for r in found.readers)
    assert first is not None
    assert second is not None
    one, two = [i for i in range(12) if i not in (1, 5, 7)], list(range(1, 9))
    h = F.linear(x, before[0], before[1]).tanh()
    whole = F.linear(h, before[2], before[3])
    change, constant = ridge(h[fit][:, one], (whole - F.linear(h[:, one], before[2][:, one], before[3]))[fit], first)
    kept = torch.tensor(two)  # the rows of units that go themselves stay as they were
    torch.testing.assert_close(model[2].weight[kept][:, one].detach(), (before[2][:, one] + change.T)[kept])
    torch.testing.assert_close(model[2].bias[kept].detach(), (before[3] + constant)[kept])
    torch.testing.assert_close(model[2].weight[:, [1, 5, 7]].detach(), before[2][:, [1, 5, 7]])
    g = F.linear(h[:, one], model[2].weight[:, one], model[2].bias).tanh().detach()[:, two]
    error = F.linear(whole.tanh(), before[4], before[5]) - F.linear(g, before[4][:, two], before[5])
    change, constant = ridge(g[fit], error[fit], second)
    torch.testing.assert_close(model[4].weight[:, two].detach(), before[4][:, two] + change.T)
    torch.testing.assert_close(model[4].bias.detach(), before[5] + constant)


@pytest.mark.parametrize("seed", range(4))
def test_of_the_ridges_that_do_about_equally_well_the_strongest_is_taken(seed: int) -> None:
    """A weaker one must be better by two percent on the inputs held out."""
    torch.manual_seed(seed)
    x = torch.randn(200, 6).double()
    model = mlp(6, 24, 4).double()
    net = PlasticNet(model, (x[:2],))
    old = model[2].weight.detach().clone()
    close(net, "0", *range(0, 24, 3))
    (reader,) = pn.repair(net, [x]).readers
    assert reader.strength is not None
    held = torch.zeros(200, dtype=torch.bool).index_fill(0, torch.arange(4, 200, 5), True)
    h = F.linear(x, model[0].weight, model[0].bias).tanh().detach()
    kept = torch.tensor([i for i in range(24) if i % 3])
    lost = h @ old.T - h[:, kept] @ old[:, kept].T

    def error(strength: float) -> float:
        change, constant = ridge(h[~held][:, kept], lost[~held], strength)
        return float((lost[held] - constant - h[held][:, kept] @ change).square().sum())

    chosen = error(reader.strength)
    assert all(error(s) >= 0.98 * chosen for s in STRENGTHS if s < reader.strength)
    assert all(error(s) > chosen for s in STRENGTHS if s > reader.strength)
    assert min(map(error, STRENGTHS)) >= 0.98 * chosen


def test_what_does_not_help_on_inputs_held_out_is_not_applied() -> None:
    """With as many weights as inputs the fit is perfect, and nothing but noise: the held-out error decides."""
    torch.manual_seed(3)
    x = torch.randn(20, 40)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 2))
    net, _ = lost(model, x, 0.2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = pn.repair(net, [x])
    assert found.after <= found.before
    for reader in found.readers:
        assert reader.after <= reader.before
        if reader.strength is None:
            assert torch.equal(before[reader.name], model.get_parameter(reader.name))


@pytest.mark.parametrize("n", [10, 30, 200])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_never_worse_on_inputs_held_out(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = images(n)
    net, _ = lost(ConvNet(), x, 0.5)
    found = pn.repair(net, [x])
    assert found.after <= found.before


# -- kinds of readers -------------------------------------------------------------------------


class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 3, stride=2, dilation=2, bias=False)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu().mean(2))


class ThreeDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 8, 3, padding=1), nn.Conv3d(8, 4, (1, 2, 3), padding=(0, 1, 1))
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu().mean((2, 3, 4)))


class Gated(nn.Module):
    """The down-projection of a gated linear unit, without a bias, in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.up, self.gate = nn.Linear(6, 6), nn.Linear(6, 16), nn.Linear(6, 16)
        self.down, self.out = nn.Linear(16, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.out = kind(4, 12, num_layers=2, batch_first=True), nn.Linear(12, 2)  # pyright: ignore[reportCallIssue]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Stepwise(nn.Module):
    """Returns what it says at every step, without biases, which the first step would read."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 12, bias=False, batch_first=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Functional(nn.Module):
    """Parameters that are used by an expression, by a function, by einsum and as two parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 10) / 2), nn.Parameter(torch.randn(10, 8) / 3)
        self.c, self.d = nn.Parameter(torch.randn(6, 8) / 3), nn.Parameter(torch.randn(6, 2))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.a).relu()
        x = (x @ self.b + self.bias).relu()
        x = F.linear(x, self.c).relu()
        return torch.einsum("bi,io->bo", x, self.d)


class Twice(nn.Module):
    """One layer that reads two sites' units in turn, and two layers that read one site."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x).relu()
        x = self.b(x).relu()
        return self.c(x) + self.d(x).tanh()


class Normed(nn.Module):
    """Convolutions without a bias before norms, as in a ResNet, with a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 3)
        with torch.no_grad():
            for norm in (self.bn1, self.bn2):
                norm.running_mean.uniform_(-0.2, 0.2)
                norm.running_var.uniform_(0.2, 1)
                norm.weight.uniform_(0.5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc((x + self.bn2(self.conv2(x))).relu().mean((2, 3)))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "linear": (lambda: mlp(5, 12, 12, 3), (5,), {"2.weight", "4.weight"}),
    "conv1d": (OneDimensional, (3, 12), {"b.weight", "c.weight"}),
    "conv2d": (ConvNet, (3, 4, 4), {"conv2.weight", "conv3.weight", "fc1.weight", "fc2.weight"}),
    "conv3d": (ThreeDimensional, (2, 3, 4, 4), {"b.weight", "c.weight"}),
    "reflected": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=2, padding_mode="reflect"), nn.Flatten(1),
            nn.Linear(4 * 36, 2),
        ),
        (3, 6, 6),
        {"2.weight", "4.weight"},
    ),
    "down-projection": (Gated, (6,), {"down.weight"}),
    "attention": (Attention, (5, 16), {"attention.out_proj.weight"}),
    "lstm": (lambda: Recurrent(nn.LSTM), (6, 4), {"rnn.weight_hh_l0", "rnn.weight_ih_l1", "out.weight"}),
    "gru": (lambda: Recurrent(nn.GRU), (6, 4), {"rnn.weight_ih_l1", "out.weight"}),
    "functional": (Functional, (4,), {"b", "c", "d"}),
    "several": (Twice, (4,), {"b.weight", "c.weight", "d.weight"}),
    "norms": (Normed, (3, 5, 5), {"conv2.weight", "fc.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reader_is_refitted(kind: str) -> None:
    torch.manual_seed(1)
    make, shape, names = KINDS[kind]
    x = torch.randn(400, *shape).double()
    net, whole = lost(make().double(), x)
    before = far(outputs(net, x), whole)
    found = pn.repair(net, x.split(80))
    assert {r.name for r in found.readers if r.strength is not None} >= names
    assert {r.name for r in found.readers} <= {n for n, _ in net.model.named_parameters()}
    assert far(outputs(net, x), whole) < 0.8 * before
    assert found.after < found.before
    torch.testing.assert_close(net.compact()(x), outputs(net, x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_readers(kind: Any) -> None:
    torch.manual_seed(2)
    x = torch.randn(300, 6, 4)
    net, whole = lost(Recurrent(kind), x)
    before = far(outputs(net, x), whole)
    found = pn.repair(net, x.split(60))
    assert {"rnn.weight_hh_l0", "rnn.weight_hh_l1"} <= {r.name for r in found.readers}
    assert not found.left_out
    assert far(outputs(net, x), whole) < 0.8 * before


def test_recurrent_weights_stay_where_the_outputs_gain_nothing() -> None:
    """The first step reads no weights that are recurrent, so that no fit of them makes its error smaller."""
    torch.manual_seed(2)
    x = torch.randn(300, 6, 4)
    net, _ = lost(Stepwise(), x)
    old = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    found = pn.repair(net, x.split(60), outputs=lambda y: y[:, 0])
    strengths = {r.name: r.strength for r in found.readers}
    assert strengths["rnn.weight_hh_l0"] is None
    assert strengths["out.weight"] is not None
    now = net.model.get_parameter("rnn.weight_hh_l0")
    torch.testing.assert_close(now, old["rnn.weight_hh_l0"], rtol=0, atol=0)


def test_groups_and_weights_that_are_computed() -> None:
    """What is computed from a parameter, or shared with something else, is left out and reported."""
    conv = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1)), nn.Flatten(1), nn.Linear(16, 3),
    )  # fmt: skip
    x = torch.randn(80, 3, 6, 6)
    net, whole = lost(conv, x)
    before = far(outputs(net, x), whole)
    found = pn.repair(net, [x])
    assert found.after <= found.before
    assert far(outputs(net, x), whole) <= before
    concerned = {r.tensor for r in net.gating.readers}
    assert {r.name for r in found.readers} | set(found.left_out) >= concerned - {"6.weight"}


def test_a_norm_takes_the_constant_of_a_convolution_without_a_bias() -> None:
    x = torch.randn(200, 3, 5, 5).double()
    net, _ = lost(Normed().double(), x)
    found = pn.repair(net, [x])
    assert {r.name: r.constant for r in found.readers}["conv2.weight"] == "bn2.running_mean"


def test_input_features_residual_streams_and_blocks() -> None:
    x = images(200)
    net, whole = lost(ConvNet(), x, inputs=("fc1",))
    before = far(outputs(net, x), whole)
    pn.repair(net, [x])
    assert far(outputs(net, x), whole) < before
    stream = torch.randn(200, 5, 16)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    net, whole = lost(nn.Sequential(layer, nn.Linear(16, 2)), stream, residual=True)
    before = far(outputs(net, stream), whole)
    found = pn.repair(net, [stream])
    assert far(outputs(net, stream), whole) < before, found
    torch.testing.assert_close(net.compact()(stream), outputs(net, stream), rtol=1e-4, atol=1e-5)
    rows = torch.randn(200, 4)
    net = PlasticNet(InOrder(), (rows[:2],), blocks=("layers.?",))
    whole = outputs(net, rows)
    close(net, "layers.depth", 1)
    before = far(outputs(net, rows), whole)
    found = pn.repair(net, [rows])
    assert found.readers
    assert far(outputs(net, rows), whole) < before


# -- what stays -------------------------------------------------------------------------------


def test_only_values_of_readers_change() -> None:
    x = images(100)
    model = ConvNet(dropout=0.5)
    model.conv1.weight.requires_grad_(False)
    calls = list[int]()
    model.fc1.register_forward_hook(lambda *_: calls.append(1))
    net = PlasticNet(model, (x[:2],))
    optimizer = torch.optim.SGD(net.param_groups(0.1))
    close_some(net)
    net.train()
    model.conv3.eval()
    objects = [(n, p, p.requires_grad, p.grad) for n, p in net.named_parameters()]
    values = {n: t.clone() for n, t in net.state_dict().items()}
    modes, hooks = [m.training for m in net.modules()], [len(m._forward_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    found = pn.repair(net, [x])
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(m._forward_pre_hooks for m in model.modules())
    now = dict(net.named_parameters())
    assert all(now[n] is p and p.requires_grad == r and p.grad is g for n, p, r, g in objects)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}
    changed = {n.removeprefix("model.") for n, t in net.state_dict().items() if not torch.equal(t, values[n])}
    allowed = {r.name for r in found.readers} | {r.constant for r in found.readers}
    allowed |= {f"{n}.{leaf}" for n in found.norms for leaf in ("running_mean", "running_var")}
    assert changed
    assert changed <= allowed
    assert calls


def test_an_error_changes_nothing() -> None:
    x = images(60)
    net, _ = lost(ConvNet(), x)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    runs = list[int]()

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 12:
            raise KeyboardInterrupt
        return model(batch)

    with pytest.raises(KeyboardInterrupt):
        pn.repair(net, [x], forward=failing)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_model_that_changes_activations_in_place() -> None:
    """Runs that begin in the middle must not see what an earlier run has changed."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(0.5)
            h = self.a(x).relu_()
            g = self.b(h).relu_()
            h += g
            h.mul_(2)
            return self.c(h)

    x = torch.randn(200, 6)
    kept = x.clone()
    net = PlasticNet(InPlace(), (x[:2].clone(),))
    whole = outputs(net, x.clone())
    close_some(net)
    before = far(outputs(net, x.clone()), whole)
    pn.repair(net, x.split(40))
    assert torch.equal(x, kept)
    assert far(outputs(net, x.clone()), whole) < before


@pytest.mark.parametrize("kind", KINDS)
def test_beginning_in_the_middle_is_the_same_as_from_the_start(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape, _ = KINDS[kind]
    x = torch.randn(60, *shape).double()
    found = list[dict[str, Tensor]]()
    for memory in (2**30, -1):
        monkeypatch.setattr("plasticnet.repairing.onward.MEMORY", memory)
        torch.manual_seed(2)
        net, _ = lost(make().double(), x)
        pn.repair(net, x.split(20))
        found.append({n: p.detach() for n, p in net.model.named_parameters()})
    for name, p in found[0].items():
        torch.testing.assert_close(p, found[1][name], rtol=1e-9, atol=1e-9)


# -- batches ----------------------------------------------------------------------------------


def test_batches_of_all_forms_give_the_same() -> None:
    x, y = torch.randn(100, 4), torch.arange(100)
    forms: list[tuple[list[Any], dict[str, Any]]] = [
        ([x], {}),
        ([(x, y)], {}),
        ([[x]], {}),
        ([((x,), y)], {}),
        ([{"input": x, "labels": y}], {}),
        ([{"other": x}], {"forward": lambda net, batch: net(batch["other"])}),
    ]
    results = list[Tensor]()
    for batches, options in forms:
        torch.manual_seed(0)
        net, _ = lost(mlp(4, 8, 3), x)
        pn.repair(net, batches, **options)
        results.append(outputs(net, x))
    assert all(torch.equal(r, results[0]) for r in results)


def test_what_cannot_be_read_is_refused() -> None:
    x = torch.randn(40, 4)
    net, _ = lost(mlp(4, 8, 3), x)
    before = outputs(net, x)
    for batches, text in (
        (iter([x]), "only once"),
        ((b for b in [x]), "only once"),
        (x, "single batch"),
        ([], "no batches"),
        ([x[:2]], "held out"),
        ([3, 4], "forward=lambda"),
        ([{"wrong": x}, {"wrong": x}], "forward takes"),
    ):
        with pytest.raises(PlasticError, match=text):
            pn.repair(net, batches)  # pyright: ignore[reportArgumentType]
    net.k = 7.0
    with pytest.raises(PlasticError, match="k is 7"):
        pn.repair(net, [x])
    net.k = float("inf")
    assert torch.equal(outputs(net, x), before)


def test_outputs_choose_what_counts_and_reading_stops() -> None:
    x = torch.randn(100, 4)
    net, _ = lost(mlp(4, 8, 3), x)
    read = list[int]()

    class Batches(list[Tensor]):
        def __iter__(self) -> Any:
            for b in list.__iter__(self):
                read.append(len(b))
                yield b

    found = pn.repair(net, Batches(x.split(10)), outputs=lambda y: y[:, :1], calibrate=45)
    assert sum(read) == 50
    assert found.inputs == 45
    assert found.as_dict()["after"] == found.after


def test_nothing_is_done_where_nothing_is_closed() -> None:
    x = torch.randn(50, 4)
    net = PlasticNet(mlp(4, 8, 3), (x[:2],))
    found = pn.repair(net, [x])
    assert found.readers == ()
    assert (found.before, found.after) == (0, 0)


# -- towards another network ------------------------------------------------------------------


def test_towards_a_network_that_had_closed_units_already() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6).double()
    net = PlasticNet(mlp(6, 20, 12, 3).double(), (x[:2],))
    close(net, "0", 0, 1, 2)
    were, aim = {n: s.open for n, s in net.sites.items()}, outputs(net, x[300:])
    close_some(net)
    lost = far(aim, outputs(net, x[300:]))
    other = PlasticNet(copy.deepcopy(net.model), (x[:2],))
    other.load_state_dict(net.state_dict())
    found = pn.repair(net, x[:300].split(50), towards=were)
    pn.repair(other, x[:300].split(50))
    assert found.after < found.before
    mended, towards_all = (far(aim, outputs(n, x[300:])) for n in (net, other))
    assert mended < 0.5 * lost
    assert mended < towards_all


def test_towards_itself_changes_nothing() -> None:
    x = torch.randn(60, 6)
    net = PlasticNet(mlp(6, 20, 12, 3), (x[:2],))
    close_some(net)
    before = copy.deepcopy(net.state_dict())
    found = pn.repair(net, x.split(20), towards={n: s.open for n, s in net.sites.items()})
    assert found.before == found.after == 0
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


@pytest.mark.parametrize(
    ("towards", "message"),
    [
        ({}, "nothing for 0, and should have a boolean for each of its 20 units"),
        ({"0": torch.ones(20), "2": torch.ones(12, dtype=torch.bool)}, "for 0"),
        ({"0": torch.ones(20, dtype=torch.bool), "2": torch.ones(3, dtype=torch.bool)}, "12 units"),
        ({"0": [True] * 20, "2": torch.ones(12, dtype=torch.bool)}, "for 0"),
        ({"x": torch.ones(2, dtype=torch.bool)}, "no such site|20 units"),
    ],
)
def test_towards_what_does_not_fit(towards: Any, message: str) -> None:
    x = torch.randn(60, 6)
    net = PlasticNet(mlp(6, 20, 12, 3), (x[:2],))
    with pytest.raises(PlasticError, match=message):
        pn.repair(net, x.split(20), towards=towards)


class Transposed(nn.Module):
    """Attention that gets its batch on the second axis, so that torch multiplies a stack of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(4, 12), nn.Linear(12, 2)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        return self.out(self.attention(h, h, h, need_weights=False)[0].mean(1))


def test_a_weight_that_is_multiplied_as_a_stack_of_itself() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 3, 4)
    net = PlasticNet(Transposed(), (x[:2],))
    with torch.no_grad():
        net.sites["stem"].phi[:4] = -1.0
    found = pn.repair(net, x.split(50))
    assert found.after < 0.7 * found.before
    assert "attention.in_proj_weight" in {r.name for r in found.readers}


def test_numbers_that_are_not_finite_are_named() -> None:
    """In the inputs that are held out they are refused; elsewhere readers are left out and reported."""
    torch.manual_seed(0)
    x = torch.randn(100, 4)
    net = PlasticNet(mlp(4, 8, 3), (x[:2],))
    with torch.no_grad():
        net.sites["0"].phi[:3] = -1.0
    before = copy.deepcopy(dict(net.state_dict()))
    x[7] = float("nan")
    assert "not finite" in pn.repair(net, x.split(25)).left_out["2.weight"]
    assert_same(dict(net.state_dict()), before)
    with pytest.raises(PlasticError, match="not finite"):
        pn.repair(net, (x * float("nan")).split(25))
    assert_same(dict(net.state_dict()), before)
