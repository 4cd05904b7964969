"""How gates enter a run of the model, and that they leave nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticNet
from plasticnet.gates.acting import Gated
from plasticnet.gates.readers import fold, readers
from tests.kit.networks import ConvNet, images, mlp, randomise_gates


class Shared(nn.Module):
    """One module under two names, and one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.again = self.b
        self.d = nn.Linear(6, 2)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh()).tanh()
        return self.c(x) + self.d(self.again(x))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.a, self.rnn = nn.Linear(3, 6), kind(6, 5, batch_first=True, **options)
        self.b = nn.Linear(10 if self.rnn.bidirectional else 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.rnn(self.a(x))[0])


class Fails(nn.Module):
    """Raises where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            raise RuntimeError("on purpose")
        return x


class Everything(nn.Module):
    """Whatever gates act on: weights, inputs, blocks, norms, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.bomb = nn.Linear(3, 6), nn.LayerNorm(6), Fails()
        self.block = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.rnn, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block(self.stem(x)))
        return self.head(self.bomb(self.rnn(x)[0]))


def traces_of(model: nn.Module) -> dict[str, Any]:
    """All that a run may touch on a model, by place and by identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name} parameters"] = {n: id(p) for n, p in module._parameters.items()}
        found[f"{name} forward"] = module.__dict__.get("forward")
        found[f"{name} attributes"] = set(module.__dict__)
        found[f"{name} hooks"] = (
            list(module._forward_hooks), list(module._forward_pre_hooks), list(module._forward_hooks_always_called)
        )  # fmt: skip
        if isinstance(module, nn.RNNBase):
            found[f"{name} flat"] = [id(w) for w in module._flat_weights]
    return found


NETS: dict[str, Callable[[], pn.PlasticNet]] = {
    "shared": lambda: pn.PlasticNet(Shared().double(), torch.randn(4, 3).double()),
    "LSTM": lambda: pn.PlasticNet(Recurrent().double(), torch.randn(4, 7, 3).double()),
    "everything": lambda: pn.PlasticNet(
        Everything().double(), torch.randn(4, 7, 3).double(), residual=True, blocks=("block",)
    ),
    "input sites": lambda: pn.PlasticNet(ConvNet(norm=False).double(), images().double(), inputs=("fc1",)),
}


def inputs(name: str) -> Tensor:
    return {"shared": torch.randn(4, 3), "input sites": images()}.get(name, torch.randn(4, 7, 3)).double()


@pytest.mark.parametrize("name", NETS)
def test_a_run_leaves_nothing_behind(name: str) -> None:
    net, x = NETS[name](), inputs(name)
    before = traces_of(net.model)
    net.k = 2.0
    randomise_gates(net)
    masked = net.eval()(x)
    assert traces_of(net.model) == before
    assert (net.compact()(x) - masked).abs().max() <= 1e-9 * masked.abs().max()
    assert (net.model(x) - masked).abs().max() > 1e-3  # the gates did act
    for _ in range(3):
        net.train()(x)
    assert traces_of(net.model) == before


@pytest.mark.parametrize("gates", ["batch", "sample"])
def test_an_exception_restores_everything(gates: str) -> None:
    x = torch.randn(4, 7, 3)
    net = pn.PlasticNet(Everything(), x, residual=True, blocks=("block",), gates=gates)  # pyright: ignore
    assert any(s.units.norms for s in net.sites.values())
    assert "depth" in net.sites
    net.k = 2.0
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[: max(len(site) // 2, 1)] = -9.0  # closed, with certainty
    before, expected = traces_of(net.model), net.eval()(x)
    net.model.bomb.armed = True
    for training in (False, True):
        with pytest.raises(RuntimeError, match="on purpose"):
            net.train(training)(x)
        assert traces_of(net.model) == before
    net.model.bomb.armed = False
    assert torch.equal(net.eval()(x), expected)
    with pytest.raises(RuntimeError):  # inside of a consumer
        net(torch.randn(4, 7, 2))
    assert traces_of(net.model) == before


@pytest.mark.parametrize("name", NETS)
def test_all_open_multiplies_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = NETS[name](), inputs(name)
    plain = copy.deepcopy(net.model)
    folded: list[int] = []
    monkeypatch.setattr("plasticnet.gates.run.fold", lambda *a: folded.append(1) or fold(*a))
    for training in (False, True):
        assert torch.equal(net.train(training)(x), plain.train(training)(x))
    assert not folded
    with torch.no_grad():
        next(iter(net.sites.values())).phi[0] = -1.0
    net.eval()(x)
    assert folded  # else the above could not fail


def test_shared_modules_and_parameters_are_folded_in_every_place() -> None:
    net, x = NETS["shared"](), inputs("shared")
    with torch.no_grad():
        net.sites["a"].phi[2] = -1.0
    model = copy.deepcopy(net.model)
    with torch.no_grad():
        for layer in (model.b, model.c):
            layer.weight[:, 2] = 0.0
    assert (net.eval()(x) - model(x)).abs().max() <= 1e-12
    small = net.compact()
    assert small.b is small.again
    assert small.c.weight is small.d.weight
    assert (small(x) - model(x)).abs().max() <= 1e-12
    assert net.model.b is net.model.again
    assert net.model.c.weight is net.model.d.weight


KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "LSTM of two layers": (nn.LSTM, {"num_layers": 2}),
    "bidirectional LSTM": (nn.LSTM, {"bidirectional": True}),
    "LSTM without bias": (nn.LSTM, {"bias": False}),
    "GRU": (nn.GRU, {"num_layers": 2}),
    "RNN": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers(kind: str) -> None:
    make, options = KINDS[kind]
    x = torch.randn(4, 7, 3).double()
    net = pn.PlasticNet(Recurrent(make, **options).double(), x)
    assert {n: len(s) for n, s in net.sites.items()} == {"a": 6, "rnn": 5}
    for k in (float("inf"), 3.0):
        net.k = k
        randomise_gates(net)
        masked, small = net.eval()(x), net.compact()
        assert (small(x) - masked).abs().max() <= 1e-9
        assert (small.rnn.input_size, small.rnn.hidden_size) == tuple(int(s.open.sum()) for s in net.sites.values())
    flat = net.model.rnn._flat_weights
    assert [id(w) for w in flat] == [id(getattr(net.model.rnn, n)) for n in net.model.rnn._flat_weights_names]
    net.train()
    net.expected_loss(lambda: net(x).pow(2).sum((1, 2))).backward()
    for w in flat:
        assert w.grad is not None  # through the folded weights


def test_fold_multiplies_both_dimensions_of_a_weight() -> None:
    """Column by column what the readers say, in the weight's own precision."""
    model = mlp(4, 6, 5, 3).half()
    sites = pn.trace(model.float(), torch.randn(2, 4)).sites
    z = torch.cat([torch.rand(11), torch.ones(1)])
    folded = fold(dict(model.named_parameters()), readers(sites, model), z)
    assert set(folded) == {"2.weight", "4.weight"}
    torch.testing.assert_close(folded["2.weight"], model[2].weight * z[:6])
    torch.testing.assert_close(folded["4.weight"], model[4].weight * z[6:11])
    half = model.half()
    assert fold(dict(half.named_parameters()), readers(sites, half), z)["2.weight"].dtype == torch.float16


def test_rows_that_are_no_samples_are_refused() -> None:
    net = pn.PlasticNet(mlp(4, 6, 3), torch.randn(2, 4))
    z = torch.ones(5, 7)
    z[0, 0] = 0.0
    with pytest.raises(pn.PlasticError, match=r'reads 3 rows.*5 samples.*gates="batch"'):
        net.gating.run(z, (torch.randn(3, 4),), {})
    assert not net.model[2]._forward_pre_hooks


@pytest.mark.parametrize("closed", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("shape", "axis"), [((4, 5), -1), ((4, 3, 5), -1), ((4, 5, 3, 2), -3), ((4, 7, 2, 5), -1)])
def test_sparing_product_is_the_product(shape: tuple[int, ...], axis: int, closed: float) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    z = torch.rand(4, 5, dtype=torch.float64) + 0.1
    z = torch.where(torch.rand(4, 5) < closed, 0.0, z).requires_grad_()
    wide = [1] * x.dim()
    wide[0], wide[axis] = 4, 5
    grad = torch.randn(shape, dtype=torch.float64)
    found, expected = Gated.apply(x, z, axis), x * z.reshape(wide)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)
    gradients = (torch.autograd.grad(y, (x, z), grad) for y in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class InPlace(nn.Linear):
    """A layer that changes its input."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input.relu_(), self.weight, self.bias)


def test_layers_that_change_their_input_in_place() -> None:
    x = torch.randn(6, 4)
    net = PlasticNet(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), InPlace(5, 3)), (x,))
    net.k = 2.0
    net.train()
    net.expected_loss(lambda: net(x).square().sum(1)).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())


def test_weights_are_folded_once_until_they_or_the_gates_change(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = list[str]()

    def counting(parameters: Any, found: Any, z: Tensor) -> dict[str, Tensor]:
        new = fold(parameters, found, z)
        folded.extend(new)
        return new

    for module in ("run", "readers"):
        monkeypatch.setattr(f"plasticnet.gates.{module}.fold", counting)
    x = torch.randn(5, 4)
    net = PlasticNet(mlp(4, 8, 6, 3), (x,)).eval()
    names = [r.tensor for r in net.gating.readers]
    with torch.no_grad():
        net.sites["0"].phi[:3] = -1.0
        before = net(x)
        with net.gating.folding_once():
            folded.clear()
            assert torch.equal(net(x), before)
            assert torch.equal(net(x), before)
            assert folded == names
            net.model[4].weight.detach().add_(1.0)
            changed = net(x)
            assert folded == [*names, "4.weight"]
            net.sites["0"].phi[3] = -1.0
            closed = net(x)
            assert folded == [*names, "4.weight", *names]
        assert torch.equal(net(x), closed)
        net.sites["0"].phi[3] = 1.0
        assert torch.equal(net(x), changed)
        assert not torch.equal(changed, before)
    with net.gating.folding_once():
        net(x).sum().backward()  # what is kept has no graph, so that a run with gradients folds anew
        net.zero_grad()
        net(x).sum().backward()
    assert all(p.grad is not None for p in net.model.parameters())
