"""Which units tracing finds, what it freezes and why; rules that users register."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.models import LeNet5
from plasticnet.tracing.labels import Ledger, Tag, labelled, plain
from plasticnet.tracing.layout import reshape
from plasticnet.tracing.mode import Tracer
from tests.kit.draws import last_draw
from tests.kit.networks import ConvNet, images, mlp


def sizes(model: nn.Module, x: Tensor, **options: object) -> dict[str, int]:
    return {n: u.size for n, u in pn.trace(model, (x,), **options).sites.items()}  # pyright: ignore[reportArgumentType]


def test_lenet() -> None:
    traced = pn.trace(LeNet5(), (torch.randn(2, 1, 28, 28),))
    assert {n: u.size for n, u in traced.sites.items()} == {"conv1": 20, "conv2": 50, "fc1": 500}
    assert traced.frozen == {"fc2": "reaches the model's output"}
    slices = {(s.tensor, s.dim): s for s in traced.sites["conv2"].slices}
    assert set(slices) == {("conv2.weight", 0), ("conv2.bias", 0), ("fc1.weight", 1)}
    assert (slices["fc1.weight", 1].index == np.arange(800).reshape(50, 16)).all()
    (consumer,) = traced.sites["conv2"].consumers
    assert (consumer.module, consumer.axis, consumer.per_sample) == ("fc1", -1, True)


def test_input_sites() -> None:
    x = torch.randn(2, 1, 28, 28)
    assert sizes(LeNet5(), x, inputs=("fc*",)) == {"conv1": 20, "conv2": 50, "fc1.input": 800, "fc1": 500}
    assert sizes(mlp(5, 4, 3), torch.randn(2, 5), inputs=("*",)) == {"0.input": 5, "0": 4}
    with pytest.raises(pn.PlasticError, match=r"inputs='dense\*' matches no module"):
        pn.trace(LeNet5(), (x,), inputs=("dense*",))


def test_residual_concat_and_shared_layers() -> None:
    traced = pn.trace(ConvNet(), (images(),))
    assert {n: u.size for n, u in traced.sites.items()} == {"conv1": 6, "conv3": 4, "fc1": 8}
    owned = {(s.tensor, s.dim) for s in traced.sites["conv1"].slices}
    assert {("conv1.weight", 0), ("bn1.running_mean", 0), ("conv2.weight", 0), ("conv2.weight", 1)} <= owned
    twice = nn.Linear(4, 4)
    shared = nn.Sequential(nn.Linear(3, 4), twice, nn.Tanh(), twice, nn.Linear(4, 2))
    assert sizes(shared, torch.randn(2, 3)) == {"0": 4}


class Body(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.a, self.between = nn.Conv2d(3, width, 1), between
        self.b = nn.LazyConv2d(4, 1)
        self.b(self.between(self.a(images(1))))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def shuffle(x: Tensor) -> Tensor:
    return x.reshape(len(x), 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def long_convolution(x: Tensor) -> Tensor:
    """Convolve every channel with a filter as long as its rows, as state space models do."""
    filters = torch.linspace(-1, 1, 4).to(x).expand(x.shape[1], 1, 4)
    return torch.fft.irfft(torch.fft.rfft(x, n=8) * torch.fft.rfft(filters, n=8), n=8)[..., :4]


class Scalar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2


EXACT: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "pointwise": (lambda x: F.gelu(x) * x.sigmoid() + 1, 8),
    "spatial": (lambda x: F.interpolate(F.pad(F.avg_pool2d(x, 2), (1, 1, 1, 1), mode="reflect"), scale_factor=2), 8),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 4),
    "dropout": (nn.Sequential(nn.Dropout2d(), nn.AlphaDropout(), nn.Dropout()), 8),
    "glu": (lambda x: F.glu(x, 1), 4),
    "shuffle": (shuffle, 4),
    "stack": (lambda x: torch.stack([x, x], 2).sum(2), 8),
    "expand": (lambda x: x * x.mean(1, keepdim=True).detach().mul(0).expand_as(x), 0),
    "permute": (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 8),
    "zeros": (lambda x: x + torch.zeros(x.shape), 8),
    "written in place": (lambda x: torch.zeros_like(x).add_(x).mul_(2), 8),
    "distances": (lambda x: torch.cdist(x, x), 8),
    "sort": (lambda x: x.sort(-1).values + x.topk(4, 2)[0] + x.argsort(3, descending=True).to(x), 8),
    "median": (lambda x: x - x.median(2, keepdim=True)[0] + x.flatten(2).kthvalue(3)[0][..., None, None], 8),
    "mode": (lambda x: x.quantile(0.3, 2, True) - x.mode(-1, True).values + x.aminmax(dim=2, keepdim=True)[0], 8),
    "accumulated": (lambda x: x.cummax(2)[0] + x.logcumsumexp(3) + x.clone().cumsum_(-1) + x.cumsum(0), 8),
    "axes in place": (lambda x: x.clone().unsqueeze_(1).tanh().squeeze_(1).transpose_(2, 3), 8),
    "squeeze and excite": (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), 8),
    "fourier": (
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x).mul(0.5j), s=x.shape[2:]) + torch.fft.fft(x, dim=0).imag,
        8,
    ),
    "long convolution": (long_convolution, 8),
    "fourier over groups": (lambda x: torch.fft.fft(x.unflatten(1, (2, -1)), dim=1).real.flatten(1, 2), 4),
    "triangles": (lambda x: x.tril() @ x.clone().triu_(-1) * torch.ones(4, 4).to(x).tril(), 8),
    "diagonals": (lambda x: x.diagonal(1, 3, -2)[..., None] + x.diagonal(0, 0, 2).permute(2, 0, 1)[:, :, None, :3], 8),
    "einsum with a view": (lambda x: torch.movedim(x, 1, -1).flatten(1, 2).unflatten(1, (4, 4)).movedim(-1, 1), 8),
}
ACTIVATIONS: dict[str, Any] = {
    f.__name__: f
    for f in (F.celu, F.elu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu, F.relu6, F.rrelu)
} | {"selu": F.selu, "silu": F.silu, "threshold": partial(F.threshold, threshold=0.1, value=0.0)}
for activation in ACTIVATIONS:
    EXACT[activation] = ACTIVATIONS[activation], 8
    EXACT[f"{activation} in place"] = partial(ACTIVATIONS[activation], inplace=True), 8
EXACT["slopes by chance"] = nn.Sequential(nn.RReLU(), nn.RReLU(inplace=True)), 8
EXACT["ldexp"] = lambda x: torch.ldexp(x, torch.tensor(2)), 8
FROZEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "softmax": (lambda x: x.softmax(1), "softmax"),
    "mean over channels": (lambda x: x - x.mean(1, keepdim=True), "reduced over its channels"),
    "flip": (lambda x: x.flip(1), "reordered"),
    "roll": (lambda x: x.roll(1, 1), "reordered"),
    "unequal chunk": (lambda x: torch.cat(x.split([3, 5], 1), 1), "does not run when units are cut"),
    "index": (lambda x: x[:, torch.tensor([0, 2, 1])], "indexed by position"),
    "one channel": (lambda x: x[:, :1] * x, "single channels"),
    "sort": (lambda x: x.sort(1).values, "sorted over its channels"),
    "topk": (lambda x: x.topk(8, -3)[0], "sorted over its channels"),
    "median": (lambda x: x - x.median(1, keepdim=True)[0], "reduced over its channels"),
    "cummax": (lambda x: x.cummax(1)[0], "accumulated over its channels"),
    "windows of channels": (lambda x: x.unfold(1, 2, 1).sum(-1), "cut into windows over its channels"),
    "determinants": (lambda x: x * torch.linalg.det(x)[..., None, None], "no rule"),
    "fourier": (lambda x: torch.fft.fft(x, dim=1).real, "transformed over its channels"),
    "fourier of all axes": (lambda x: torch.fft.rfftn(x, dim=(-3, -1)).abs(), "transformed over its channels"),
    "triangle": (lambda x: x.transpose(1, 2).tril().transpose(1, 2), "cut to a triangle with its channels"),
    "diagonal": (lambda x: x.diagonal(0, 1, 2)[:, None].expand(-1, 8, -1, -1), "read along a diagonal of its channels"),
    "flat roll": (lambda x: x.roll(16), "reordered"),
    "numbers in order": (lambda x: x * torch.ones(x.shape[1]).to(x).cumsum(0)[:, None, None], "that forward makes"),
    "data-dependent control flow": (lambda x: x if x.amax() > 0 else -x, "reduced|read"),
    "noise of fixed width": (lambda x: x + torch.randn(1, 8, 1, 1), "does not run when units are cut"),
    "hard-coded divisor": (lambda x: x / x.shape[1], "way that tracing cannot see"),
    "hard-coded width": (lambda x: x.reshape(-1, 8, 16).reshape(x.shape), "does not run|no rule|cannot"),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    between, units = EXACT[name]
    if units == 0:
        with pytest.raises(pn.PlasticError):
            pn.PlasticNet(Body(between), (images(),))
        return
    net = pn.PlasticNet(Body(between).double(), (images().double(),))
    assert {n: len(s) for n, s in net.sites.items()} == {"a": units}
    with torch.no_grad():
        net.sites["a"].phi[::2] = -1.0
    x = images().double()
    assert (net.eval()(x) - net.compact()(x)).abs().max() <= 1e-12


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_with_its_reason(name: str) -> None:
    between, reason = FROZEN[name]
    with pytest.raises(pn.PlasticError, match=f"nothing to gate.*a: .*({reason})"):
        pn.PlasticNet(Body(between), (images(),))


@pytest.mark.parametrize(
    ("model", "x", "units"),
    [
        (
            nn.Sequential(
                nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.MaxPool1d(2), nn.ConvTranspose1d(6, 4, 2),
                nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(12, 2),
            ),
            torch.randn(3, 2, 12), [6, 4],
        ),
        (
            nn.Sequential(
                nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.AvgPool3d(2), nn.Conv3d(6, 6, 1, groups=6),
                nn.ConvTranspose3d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(108, 2),
            ),
            torch.randn(3, 2, 4, 4, 4), [2],
        ),
        (
            nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.InstanceNorm2d(6, affine=True),
                nn.Conv2d(6, 2, 3, padding=1, padding_mode="replicate"),
            ),
            torch.randn(3, 3, 4, 4), [6],
        ),
    ],
    ids=["1d", "3d, depthwise, grouped and transposed", "padding modes and instance norm"],
)  # fmt: skip
def test_layer_kinds(model: nn.Module, x: Tensor, units: list[int]) -> None:
    net = pn.PlasticNet(model.double(), (x.double(),))
    assert [len(s) for s in net.sites.values()] == units
    assert all(s.units.growable for s in net.sites.values())
    net.k = 3.0
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.copy_(torch.linspace(-0.5, 0.5, len(site)))
    out = net.eval()(x.double())
    assert (out - net.compact()(x.double())).abs().max() <= 1e-9 * out.detach().abs().max()


def test_a_frozen_site_leaves_the_others() -> None:
    class HardCoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).view(-1, 8).tanh()).tanh())

    net = pn.PlasticNet(HardCoded(), (torch.randn(4, 3),))
    assert list(net.sites) == ["b"]
    assert "does not run when units are cut" in net.frozen["a"]


def test_zero_initialised_head_does_not_blind_the_check() -> None:
    model = mlp(4, 6, 3)
    nn.init.zeros_(model[-1].weight)
    assert list(pn.PlasticNet(model, (torch.randn(2, 4),)).sites) == ["0"]
    assert (model[-1].weight == 0).all()  # the check works on a copy


def test_tied_and_unused_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.embedding(x)) @ self.embedding.weight.t()

    traced = pn.trace(Tied(), (torch.tensor([[1, 2], [3, 4]]),))
    assert not traced.sites
    assert traced.frozen["embedding"] == "the features of an embedding; residual=True gates them"


def test_layers_that_run_only_in_training_count() -> None:
    class Auxiliary(nn.Module):
        """In training the hidden units reach the output through a softmax."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            return self.b(h.softmax(1)) if self.training else self.b(h)

    assert "softmax" in pn.trace(Auxiliary(), (torch.randn(2, 3),)).frozen["a"]


def test_batch_of_one_with_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    assert sizes(model, torch.randn(1, 3)) == {"0": 5}


def test_rows_that_are_not_samples() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:  # (batch, steps, 3)
            return self.b(self.a(x).flatten(0, 1).tanh()).unflatten(0, x.shape[:2])

    (consumer,) = pn.trace(Rows(), (torch.randn(2, 4, 3),)).sites["a"].consumers
    assert not consumer.per_sample
    net = pn.PlasticNet(Rows(), (torch.randn(2, 4, 3),))
    net.k = 2.0
    net.train()
    x = torch.randn(6, 4, 3)
    net.expected_loss(lambda: net(x).pow(2).sum((1, 2))).backward()
    assert last_draw(net) is not None
    assert last_draw(net).rows == 1


def test_dict_and_tensor_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, *, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.b(self.a(x))}

    assert list(pn.trace(Named(), {"x": torch.randn(2, 3)}).sites) == ["a"]
    assert list(pn.trace(mlp(3, 5, 2), torch.randn(2, 3)).sites) == ["0"]


def test_meta_device_is_traced_unchecked() -> None:
    with torch.device("meta"):
        net = pn.PlasticNet(LeNet5(), (torch.randn(1, 1, 28, 28),))
    assert not net.checked
    assert net.summary().macs == 2293000


def test_registered_rule() -> None:
    @torch.library.custom_op("plasticnet_tests::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    model = Body(lambda x: double(x))
    with pytest.raises(pn.PlasticError, match="plasticnet_tests::double, for which there is no rule"):
        pn.PlasticNet(model, (images(),))
    pn.register_rule("plasticnet_tests::double", "aten::pointwise")
    assert sizes(model, images()) == {"a": 8}

    def frozen(tracer: Tracer, func: object, args: tuple, kwargs: dict, out: Tensor) -> None:
        tracer.freeze(args[0], "because I say so")

    pn.register_rule(torch.ops.plasticnet_tests.double, frozen)
    with pytest.raises(pn.PlasticError, match="because I say so"):
        pn.PlasticNet(model, (images(),))
    with pytest.raises(pn.PlasticError, match="no operation 'aten::nope' has a rule"):
        pn.register_rule("plasticnet_tests::double", "aten::nope")


def test_reshape_follows_numpy() -> None:
    """Labels move through reshape and permute as the entries of an array would."""
    ledger = Ledger()
    tag = Tag((plain(2), labelled(np.arange(12)), plain(3)))
    there = reshape(ledger, tag, (2, 36))
    assert (ledger.read(there, 1) == np.repeat(np.arange(12), 3)).all()
    back = reshape(ledger, there, (2, 12, 3))
    assert (ledger.read(back, 1) == np.arange(12)).all()
    assert not ledger.pairs
    split = reshape(ledger, Tag((labelled(np.arange(12)),)), (3, 4))
    swapped = reshape(ledger, Tag((split.axes[1], split.axes[0])), (12,))
    assert (ledger.read(swapped, 0) == np.arange(12).reshape(3, 4).T.reshape(-1)).all()
    assert len(ledger.pairs) > 0  # a channel shuffle: equal members of the groups go together


class Empty(nn.Module):
    """A layer beside one of width 0."""

    def __init__(self, layer: Callable[[int, int], nn.Module], empty: nn.Module) -> None:
        super().__init__()
        self.a, self.empty, self.out = layer(3, 8), empty, layer(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.out(torch.cat([x, self.empty(x[:, :0])], 1))


def point(width: int, outputs: int, **options: Any) -> nn.Module:
    return nn.Conv2d(width, outputs, 1, **options)


@pytest.mark.parametrize(
    ("layer", "empty"),
    [
        (point, point(0, 8)),  # torch returns no channels
        (point, point(0, 8, bias=False)),
        (point, nn.Sequential(point(0, 5), nn.ReLU())),
        (nn.Linear, nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 0))),
        (nn.Linear, nn.Sequential(nn.Linear(0, 3, bias=False), nn.Linear(3, 0, bias=False))),
        (nn.Linear, nn.Sequential(nn.Linear(0, 0), nn.LayerNorm(0))),
    ],
)
def test_layers_of_width_0(layer: Any, empty: nn.Module) -> None:
    x = (torch.randn(4, 3, 2, 2) if layer is point else torch.randn(4, 3)).double()
    net = pn.PlasticNet(Empty(layer, empty).double(), (x,)).eval()
    assert len(net.sites["a"]) == 8
    assert not any("Error" in reason for reason in net.frozen.values())
    assert net.summary().macs > 0
    net.resize({"a": [0, 2, 5]})
    assert (net(x) - net.compact()(x)).abs().max() <= 1e-12
