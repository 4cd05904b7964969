"""Scores of units: what they are by their definitions, computed in other ways, and that nothing of it stays behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet
from plasticnet.oneshot.derivatives import gate_squares, taylor_squares
from plasticnet.oneshot.scores import KINDS
from plasticnet.tools.snapshot import left_as_it_was
from tests.kit.blocks import InOrder
from tests.kit.networks import ConvNet, assert_same, images, mlp, randomise_gates, train_step

Case = tuple[PlasticNet, Callable[[], Tensor]]


def problem(model: nn.Module | None = None, x: Tensor | None = None, **options: Any) -> Case:
    """A network in double precision, and its losses on twelve samples."""
    x = images(12).double() if x is None else x.double()
    net = PlasticNet((ConvNet() if model is None else model).double(), (x,), **options)
    y = torch.arange(len(x)) % 3
    return net, lambda: F.cross_entropy(net(x), y, reduction="none")


def losses_without(net: PlasticNet, loss: Callable[[], Tensor], site: str, i: int, by: float) -> Tensor:
    """The losses in evaluation mode when what reads this unit sees it scaled by 1 - ``by``."""
    net.eval()
    z = torch.ones(sum(len(s) for s in net.sites.values()) + 1, dtype=torch.float64)
    names = list(net.sites)
    z[sum(len(net.sites[n]) for n in names[: names.index(site)]) + i] -= by
    own = net.mean_gates
    net.__dict__["mean_gates"] = lambda: (z, False)
    try:
        with torch.no_grad():
            return loss()
    finally:
        del net.__dict__["mean_gates"]
        assert net.mean_gates == own


def derivatives(net: PlasticNet, loss: Callable[[], Tensor], site: str, by: float = 1e-5) -> Tensor:
    """Those of every sample's loss with respect to the gates of a site, by differences: shape (units, samples)."""
    units = range(len(net.sites[site]))
    up, down = (torch.stack([losses_without(net, loss, site, i, sign * by) for i in units]) for sign in (-1, 1))
    return (up - down) / (2 * by)


def even(squares: Tensor) -> Tensor:
    """The roots, over their root mean square."""
    return (squares / squares.mean()).sqrt().detach()


# -- magnitude --------------------------------------------------------------------------------


def test_magnitude_is_the_norm_of_what_produces_a_unit_over_its_root_mean_square() -> None:
    net = PlasticNet(mlp(4, 5, 6, 3), (torch.randn(2, 4),))
    found = pn.scores(net, "magnitude")
    assert {n: s.shape for n, s in found.items()} == {"0": (5,), "2": (6,)}
    layer = net.model[2]
    norms = torch.cat([layer.weight, layer.bias[:, None]], 1).norm(dim=1)
    torch.testing.assert_close(found["2"], even(norms.square()))
    for part in found.values():
        assert part.square().mean().item() == pytest.approx(1)


def test_magnitude_counts_norms_not_their_statistics_and_all_producers() -> None:
    net = PlasticNet(ConvNet(), (images(),))
    m = net.model
    own = [m.conv1.weight, m.conv1.bias, m.bn1.weight, m.bn1.bias, m.conv2.weight, m.conv2.bias]
    norms = torch.cat([p.flatten(1) if p.dim() > 1 else p[:, None] for p in own], 1).norm(dim=1).detach()
    torch.testing.assert_close(pn.scores(net, "magnitude")["conv1"], even(norms.square()))


def test_magnitude_of_a_feature_is_its_column_and_of_a_block_all_of_it() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    net.resize({"fc1.input": [0, 3, 7]})
    columns = net.model.fc1.weight.norm(dim=0).detach()
    torch.testing.assert_close(pn.scores(net, "magnitude")["fc1.input"], even(columns.square()))
    deep = PlasticNet(InOrder(), (torch.randn(2, 4),), blocks=("layers.?",))
    with torch.no_grad():
        for p in deep.model.layers[1].parameters():
            p.mul_(2)
    sizes = torch.stack([torch.cat([p.flatten() for p in b.parameters()]).norm() for b in deep.model.layers]).detach()
    found = pn.scores(deep, "magnitude")["layers.depth"]
    torch.testing.assert_close(found, even(sizes.square()))


def test_magnitude_does_not_depend_on_the_scale_of_a_layer() -> None:
    net = PlasticNet(mlp(4, 5, 6, 3), (torch.randn(2, 4),))
    before = pn.scores(net, "magnitude")
    with torch.no_grad():
        for p in net.model[0].parameters():
            p.mul_(100)
    torch.testing.assert_close(pn.scores(net, "magnitude"), before)


# -- taylor -----------------------------------------------------------------------------------


def test_taylor_is_the_squared_sum_of_gradient_times_weight() -> None:
    net, loss = problem()
    net.eval()
    found = pn.scores(net, "taylor", loss)
    loss().mean().backward()
    m = net.model
    own = [m.conv3.weight, m.conv3.bias]
    expected = sum((p.grad * p).flatten(1).sum(1) if p.dim() > 1 else p.grad * p for p in own)
    torch.testing.assert_close(found["conv3"], even(expected.square()))


def test_taylor_of_what_does_not_train_is_the_same() -> None:
    net, loss = problem()
    expected = pn.scores(net, "taylor", loss)
    net.model.conv1.requires_grad_(False)
    assert_same(pn.scores(net, "taylor", loss), expected)
    assert not net.model.conv1.weight.requires_grad
    assert net.model.conv2.weight.requires_grad


def test_taylor_and_gate_agree_behind_homogeneous_activations() -> None:
    """Scaling all that produces a unit, bias included, is scaling the unit behind a ReLU."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    net, loss = problem(model, torch.randn(9, 4))
    torch.testing.assert_close(pn.scores(net, "taylor", loss), pn.scores(net, "gate", lambda: loss().mean()))


# -- gate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [True, False])
def test_gate_is_the_squared_derivative_of_the_loss(per_sample: bool) -> None:
    net, loss = problem(inputs=("fc1",))
    found = pn.scores(net, "gate", loss if per_sample else lambda: loss().mean())
    for name in ("conv1", "conv3", "fc1.input", "fc1"):
        each = derivatives(net, loss, name)
        expected = each.square().mean(1) if per_sample else each.mean(1).square()
        torch.testing.assert_close(found[name], even(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"gates": "batch"}, {"residual": True}, {"blocks": ("layers.?",)}])
def test_gates_that_the_batch_shares_have_the_derivative_of_the_mean(options: dict[str, Any]) -> None:
    class Normed(InOrder):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.layers(self.stem(x))))

    net, loss = problem(Normed() if "residual" in options else InOrder(), torch.randn(9, 4), **options)
    found = pn.scores(net, "gate", loss)
    name = next(n for n in net.sites if n.endswith("up"))
    expected = derivatives(net, loss, name).mean(1).square()
    torch.testing.assert_close(found[name], even(expected), rtol=1e-5, atol=1e-5)


def test_the_gate_of_a_block_mixes_it_with_its_input() -> None:
    net, loss = problem(InOrder(), torch.randn(9, 4), blocks=("layers.?",))
    found = pn.scores(net, "gate", loss)["layers.depth"]

    def mixed(i: int, z: float) -> float:
        handle = net.model.layers[i].register_forward_hook(lambda m, args, out: z * out + (1 - z) * args[0])
        with torch.no_grad():
            value = loss().mean().item()
        handle.remove()
        return value

    net.eval()
    slopes = torch.tensor([(mixed(i, 1 + 1e-5) - mixed(i, 1 - 1e-5)) / 2e-5 for i in range(3)], dtype=torch.float64)
    torch.testing.assert_close(found, even(slopes.square()), rtol=1e-5, atol=1e-5)


def test_several_calls_of_the_network_in_a_loss() -> None:
    """Each on some of the samples, or all on the same ones: the scores are those of one call."""
    net, _ = problem()
    x, y = images(12).double(), torch.arange(12) % 3

    def whole() -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    def parts() -> Tensor:
        halves = zip(x.split(6), y.split(6), strict=True)
        return torch.cat([F.cross_entropy(net(a), b, reduction="none") for a, b in halves])

    def twice() -> Tensor:
        return F.cross_entropy((net(x) + net(x)) / 2, y, reduction="none")

    expected = pn.scores(net, "gate", whole)
    torch.testing.assert_close(pn.scores(net, "gate", parts), expected)
    torch.testing.assert_close(pn.scores(net, "gate", twice), expected)


def test_rows_that_are_not_samples() -> None:
    """A layer that reads more rows than there are samples: the gates are then those of the batch."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.a(x.reshape(-1, 4)).tanh()
            return self.b(rows).reshape(len(x), -1, 3).mean(1)

    net, loss = problem(Folded(), torch.randn(9, 2, 4))
    found = pn.scores(net, "gate", loss)["a"]
    torch.testing.assert_close(found, even(derivatives(net, loss, "a").mean(1).square()), rtol=1e-5, atol=1e-5)


# -- all kinds --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["taylor", "gate"])
def test_squares_are_averaged_over_batches(kind: str) -> None:
    net, _ = problem()
    x, y = images(12).double(), torch.arange(12) % 3
    parts = list(zip(x.split(4), y.split(4), strict=True))
    turn = iter(parts)

    def next_batch() -> Tensor:
        a, b = next(turn)
        return F.cross_entropy(net(a), b, reduction="none")

    of_batch = {"taylor": taylor_squares, "gate": gate_squares}[kind]
    with left_as_it_was(net, training=False):
        losses = [lambda a=a, b=b: F.cross_entropy(net(a), b, reduction="none") for a, b in parts]
        squares = torch.stack([of_batch(net, loss) for loss in losses]).mean(0)
    found = pn.scores(net, kind, next_batch, batches=3)
    for part, name in zip(squares.split([len(s) for s in net.sites.values()]), net.sites, strict=True):
        torch.testing.assert_close(found[name], even(part))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "repair"])
def test_closed_units_have_nothing(kind: str) -> None:
    net, loss = problem()
    with torch.no_grad():
        net.sites["conv1"].phi[2] = -1.0
    found = pn.scores(net, kind, loss)["conv1"]
    assert found[2] == 0
    assert (found > 0).sum() == 5


@pytest.mark.parametrize("k", [math.inf, 7.0])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "repair"])
def test_nothing_is_left_behind(kind: str, k: float) -> None:
    x, y = images(6), torch.arange(6) % 3
    net = PlasticNet(ConvNet(dropout=0.5), (x,))
    net.k = 7.0
    randomise_gates(net)
    train_step(net, Adam(net.param_groups(1e-3)), x)
    net.k = k
    net.train()
    net.model.bn1.eval()

    def loss() -> Tensor:
        i = torch.randperm(6)[:4]
        return F.cross_entropy(net(x[i]), y[i], reduction="none")

    def state() -> Any:
        gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        flags = [m.training for m in net.modules()]
        return {n: t.clone() for n, t in net.state_dict().items()}, gradients, flags, torch.get_rng_state(), net.k

    before = state()
    pn.scores(net, kind, loss, batches=2)
    assert_same(state(), before)
    with nullcontext() if kind == "magnitude" else pytest.raises(PlasticError, match="not finite"):
        pn.scores(net, kind, lambda: loss() * math.nan)
    assert_same(state(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("kind", ["taylor", "gate"])
def test_recurrent_and_complex(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    net, loss = problem(Net(), torch.randn(6, 3, 4))
    assert (pn.scores(net, kind, loss)["rnn"] > 0).all()

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5, dtype=torch.cfloat), nn.Linear(5, 3, dtype=torch.cfloat)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.to(torch.cfloat))).abs()

    x, y = torch.randn(6, 4), torch.arange(6) % 3
    net = PlasticNet(Complex(), (x,))
    gate = pn.scores(net, "gate", lambda: F.cross_entropy(net(x), y))["a"]
    taylor = pn.scores(net, "taylor", lambda: F.cross_entropy(net(x), y))["a"]
    torch.testing.assert_close(taylor, gate, rtol=1e-3, atol=1e-8)  # it is linear in each of them


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"outputs": lambda out: [out]}, {"weights": ("fc1", "conv1")}])
def test_outputs_that_are_not_finite_are_named(bad: float, options: dict[str, Any]) -> None:
    net, _ = problem(weights=options.get("weights", ()))
    x = images(12).double()
    x[3] = bad
    for kind in ("fisher", "repair"):
        with pytest.raises(PlasticError, match=r"model's outputs on a batch.*look for such numbers in the inputs"):
            pn.scores(net, kind, batches=[x], outputs=options.get("outputs"))


def test_what_is_refused() -> None:
    net, loss = problem()
    for kind in ("taylor", "gate"):
        with pytest.raises(PlasticError, match="need a loss"):
            pn.scores(net, kind)
        with pytest.raises(PlasticError, match="depends on the network"):
            pn.scores(net, kind, lambda: loss().detach())
        with pytest.raises(PlasticError, match="never called the network"):
            pn.scores(net, kind, lambda: torch.ones(3, requires_grad=True))
    with pytest.raises(PlasticError, match="choose one of fisher, repair, magnitude, taylor, gate"):
        pn.scores(net, "size")
    with pytest.raises(PlasticError, match="1 or more"):
        pn.scores(net, "taylor", loss, batches=0)
    x = images(12).double()
    for kind in ("fisher", "repair"):
        for batches, place in (([x, x[:0]], 2), ([x[:0], x], 1)):
            with pytest.raises(PlasticError, match=rf"batch {place} is empty: float64\[0, 3, 4, 4\]; leave out"):
                pn.scores(net, kind, batches=batches)
    with pytest.raises(PlasticError, match=r"loss that scores follow is not finite.*in the inputs"):
        pn.scores(net, "gate", lambda: loss() * math.inf)
    with torch.no_grad():
        net.model.fc2.weight.zero_()
    with pytest.raises(PlasticError, match="no unit moves the loss"):
        pn.scores(net, "gate", loss)
    with torch.no_grad():
        net.model.fc1.weight[1, 1] = math.nan
    with pytest.raises(PlasticError, match=r"site 'fc1'.*not finite"):
        pn.scores(net, "magnitude")
