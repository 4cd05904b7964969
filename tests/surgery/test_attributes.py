"""Attributes such as ``out_channels`` follow a resize, in whatever order a layer holds its parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

import plasticnet as pn


def pruned(layer: nn.Module, name: str = "weight") -> nn.Module:
    prune.l1_unstructured(layer, name, 0.2)
    prune.remove(layer, name)
    return layer


def parametrized(layer: nn.Module) -> nn.Module:
    parametrizations.weight_norm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    return layer


REMOVED: dict[str, Callable[[Any], Any]] = {  # each leaves the bias before the weight
    "pruning": pruned,
    "weight_norm": lambda layer: remove_weight_norm(weight_norm(layer)),
    "spectral_norm": lambda layer: remove_spectral_norm(spectral_norm(layer)),
    "a parametrization": parametrized,
}
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "Linear": (nn.Linear, (2, 4)),
    "Conv1d": (lambda i, o: nn.Conv1d(i, o, 3), (2, 4, 9)),
    "Conv2d": (lambda i, o: nn.Conv2d(i, o, 1), (2, 4, 5, 5)),
    "ConvTranspose2d": (lambda i, o: nn.ConvTranspose2d(i, o, 2), (2, 4, 5, 5)),
}


def chain(layer: Callable[..., nn.Module]) -> nn.Sequential:
    return nn.Sequential(layer(4, 8), nn.ReLU(), layer(8, 6), nn.ReLU(), layer(6, 2))


def widths(layer: nn.Module) -> tuple[int, int]:
    return tuple(getattr(layer, f"{side}_{'channels' if hasattr(layer, 'in_channels') else 'features'}")
                 for side in ("in", "out"))  # fmt: skip


def assert_follows(make: Callable[[], nn.Module], x: Tensor, path: Path, site: str, kept: list[int]) -> nn.Module:
    """The network shrinks, grows, trains and is saved; the compact module is returned."""
    net = pn.PlasticNet(make(), (x,)).eval()
    assert site in net.sites, net.frozen
    with torch.no_grad():
        net.sites[site].phi[[i for i in range(len(net.sites[site])) if i not in kept]] = -1.0
    y, small = net(x), net.compact()
    torch.testing.assert_close(small(x), y)
    pn.save(small, path)
    torch.testing.assert_close(pn.load(path, make).eval()(x), y)
    net.prune()
    torch.testing.assert_close(net(x), y)
    net.grow({site: 2})
    torch.testing.assert_close(net(x), y)
    net.train()(x).sum().backward()
    return small


@pytest.mark.parametrize("how", REMOVED)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_bias_before_the_weight(kind: str, how: str, tmp_path: Path) -> None:
    layer, shape = LAYERS[kind]

    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = chain(layer)
            for i in (0, 2, 4):
                REMOVED[how](model[i])
        assert [n for n, _ in model[0].named_parameters()] == ["bias", "weight"]
        return model

    small = assert_follows(make, torch.randn(shape), tmp_path / "a", "0", [1, 2, 5])
    assert [widths(small[i]) for i in (0, 2, 4)] == [(4, 3), (3, 6), (6, 2)]  # pyright: ignore[reportIndexIssue]


def scaled(base: Any, first: Tensor) -> type[nn.Module]:
    """A subclass of a layer that holds another parameter before its weight."""

    class Scaled(base):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.alpha, own = nn.Parameter(first.clone()), {n: self._parameters.pop(n) for n in ("weight", "bias")}
            self._parameters.update(own)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.alpha.mean()

    return Scaled


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1), (6,)])
@pytest.mark.parametrize("base", [nn.Linear, nn.Conv2d])
def test_another_parameter_before_the_weight(base: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    kind = scaled(base, torch.ones(shape))
    x = torch.randn(2, 4) if base is nn.Linear else torch.randn(2, 4, 5, 5)
    layer = kind if base is nn.Linear else lambda i, o: kind(i, o, 1)
    small = assert_follows(lambda: chain(layer), x, tmp_path / "a", "0", [1, 2, 5])
    assert [widths(small[i]) for i in (0, 2, 4)] == [(4, 3), (3, 6), (6, 2)]  # pyright: ignore[reportIndexIssue]


class Kernel(nn.Linear):
    """A layer that holds its weight by another name, or transposed."""

    def __init__(self, inputs: int, outputs: int, turned: bool) -> None:
        super().__init__(inputs, outputs)
        weight = self._parameters.pop("weight")
        self.turned, self.kernel = turned, nn.Parameter(weight.t().clone() if turned else weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel.t() if self.turned else self.kernel
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_of_another_name(turned: bool, tmp_path: Path) -> None:
    small = assert_follows(
        lambda: chain(lambda i, o: Kernel(i, o, turned)), torch.randn(2, 4), tmp_path / "a", "0", [1, 2, 5]
    )
    if not turned:
        assert widths(small[0]) == (4, 3)  # pyright: ignore[reportIndexIssue]


class Turned(nn.Linear):
    """A layer that keeps its weight as (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(self.weight.detach().t().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_a_weight_that_lies_the_other_way_round(tmp_path: Path) -> None:
    assert_follows(lambda: chain(Turned), torch.randn(2, 4), tmp_path / "a", "0", [1, 2, 5])


@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_the_widths_of_a_computed_weight(kind: str, norm: Callable[..., nn.Module], tmp_path: Path) -> None:
    layer, shape = LAYERS[kind]

    def make() -> nn.Module:
        model = chain(layer)
        norm(model[2])
        return model

    small = assert_follows(make, torch.randn(shape), tmp_path / "a", "2", [0, 3])
    assert [widths(small[i]) for i in (0, 2, 4)] == [(4, 8), (8, 2), (2, 2)]  # pyright: ignore[reportIndexIssue]


class Recurrent(nn.Module):
    def __init__(self, kind: Any, name: str, **options: Any) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(4, 6), kind(6, 6, batch_first=True, **options)
        self.out = nn.Linear(12 if options.get("bidirectional") else 6, 3)
        pruned(self.layer, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(x))[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm, prune.identity])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvTranspose2d"])
def test_a_computed_weight_that_reads_a_single_channel_for_a_while(
    kind: str, norm: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Lengths and directions of a weight_norm have one shape then."""
    layer, shape = LAYERS[kind]

    def make() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = [layer(*sides) for sides in ((4, 8), (8, 6), (6, 2))]
        norm(layers[1], "weight")
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).double().eval()

    x = torch.randn(shape).double()
    net = pn.PlasticNet(make(), (x,)).eval()
    for kept in ([3], [0, -1, -1], [1], [0]):
        net.resize(dict.fromkeys(net.sites, kept))
        assert widths(net.model[2]) == (len(net.sites["0"]), len(net.sites["2"]) if "2" in net.sites else 6)  # pyright: ignore[reportIndexIssue]
        small = net.compact()
        pn.save(small, tmp_path / "small.safetensors")
        loaded = pn.load(tmp_path / "small.safetensors", make)
        torch.testing.assert_close(loaded(x), net(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_in_another_order(kind: Any, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Recurrent(kind, name, **options)

    small = assert_follows(make, torch.randn(2, 5, 4), tmp_path / "a", "layer", [0, 1, 3, 5])
    assert (small.layer.input_size, small.layer.hidden_size) == (6, 4)
    small = assert_follows(make, torch.randn(2, 5, 4), tmp_path / "b", "embed", [0, 1, 3])
    assert (small.layer.input_size, small.layer.hidden_size) == (3, 6)


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
def test_a_recurrent_cell_in_another_order(name: str, tmp_path: Path) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell, self.out = nn.Linear(4, 5), nn.GRUCell(5, 6), nn.Linear(6, 3)
            pruned(self.cell, name)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(self.embed(x)))

    small = assert_follows(Cell, torch.randn(2, 4), tmp_path / "a", "embed", [0, 1, 3])
    assert (small.cell.input_size, small.cell.hidden_size) == (3, 6)


GROUPS: dict[str, tuple[nn.Module, int]] = {  # a norm without parameters, and the channels that it has after a cut
    "pairs": (nn.GroupNorm(4, 8, affine=False), 4),
    "two groups": (nn.GroupNorm(2, 8, affine=False), 4),
    "each channel": (nn.GroupNorm(8, 8, affine=False), 5),
    "with parameters": (nn.GroupNorm(4, 8), 4),
}
COUNTING: dict[str, tuple[nn.Module, str]] = {  # norms that count channels by an attribute alone
    "instances": (nn.InstanceNorm1d(8), "num_features"),
    "instances, with parameters": (nn.InstanceNorm1d(8, affine=True), "num_features"),
    "batch": (nn.BatchNorm1d(8, affine=False, track_running_stats=False), "num_features"),
    "batch, with statistics": (nn.BatchNorm1d(8, affine=False), "num_features"),
    "groups of one": (nn.GroupNorm(8, 8, affine=False), "num_channels"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_channels_of_a_norm_without_parameters(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(3, 8, 1), copy.deepcopy(norm), nn.Conv1d(8, 2, 1)).double()

    norm, left = GROUPS[name]
    x = torch.randn(2, 3, 5).double()
    net = pn.PlasticNet(build(), (x,)).eval()
    units, per_unit = len(net.sites["0"]), 8 // len(net.sites["0"])
    net.resize({"0": range(left // per_unit)})
    assert (net.model[1].num_groups * norm.num_channels, net.model[1].num_channels) == (norm.num_groups * left, left)
    small = net.compact()
    pn.save(small, tmp_path / "small")
    again = pn.load(tmp_path / "small", build)
    assert torch.equal(again(x), net(x))
    assert repr(again) == repr(small)
    net.grow({"0": units - left // per_unit})
    assert repr(net.model[1]) == repr(norm)


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("beside", [0, 4])
def test_norms_that_count_channels(name: str, beside: int, tmp_path: Path) -> None:
    """The norm follows its own channels, of one layer or of two whose outputs are side by side."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 8 - beside, 1), nn.Conv1d(3, max(beside, 1), 1)
            self.norm, self.out = copy.deepcopy(norm), nn.Conv1d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.a(x), self.b(x)], 1) if beside else self.a(x) + self.b(x).mean()
            return self.out(self.norm(h))

    norm, attribute = COUNTING[name]
    x = torch.randn(4, 3, 5)
    net = pn.PlasticNet(Network(), (x,)).eval()
    sources = {"a": [0, 1, 3], "b": [2, -1, -1]} if beside else {"a": [0, 1, 3, 4, 7]}
    net.resize({n: s for n, s in sources.items() if n in net.sites})
    small = net.compact()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where the number of channels is another
        assert torch.equal(small(x), net(x))
    left = sum(len(sources[n]) for n in ("a", "b")[: 1 + bool(beside)])
    assert getattr(small.norm, attribute) == left == small.out.in_channels
    pn.save(small, tmp_path / "small")
    assert repr(pn.load(tmp_path / "small", Network)) == repr(small)


TWICE: dict[str, tuple[Any, nn.Module]] = {  # how 4 channels become 8, and a norm without parameters of them
    "joined": (lambda h: torch.cat([h, h], 1), nn.GroupNorm(4, 8, affine=False)),
    "joined after pooling": (
        lambda h: torch.cat([h.mean(2), h.amax(2)], 1)[:, :, None],
        nn.GroupNorm(4, 8, affine=False),
    ),
    "joined, each channel": (lambda h: torch.cat([h, -h], 1), nn.GroupNorm(8, 8, affine=False)),
    "joined, in a batch": (lambda h: torch.cat([h, h.relu()], 1), nn.BatchNorm1d(8, affine=False)),
    "repeated": (lambda h: h.repeat(1, 2, 1), nn.BatchNorm1d(8, affine=False)),
}


@pytest.mark.parametrize("name", TWICE)
def test_channels_that_a_norm_sees_twice(name: str, tmp_path: Path) -> None:
    join, norm = TWICE[name]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.out = nn.Conv1d(3, 4, 1), copy.deepcopy(norm), nn.Conv1d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(join(self.a(x))))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 5).double()
    net = pn.PlasticNet(Network().double(), (x,)).eval()
    units = len(net.sites["a"])
    net.resize({"a": range(units // 2)})
    small = net.compact()
    width = getattr(small.norm, "num_channels", None) or small.norm.num_features
    assert width == 4 == small.out.in_channels
    torch.testing.assert_close(small(x), net(x))
    pn.save(small, tmp_path / "small")
    again = pn.load(tmp_path / "small", lambda: Network().double())
    assert torch.equal(again(x), small(x))
