"""compact equals eval, exactly, on generated networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plasticnet import PlasticError, PlasticNet, Take
from tests.kit.generated import Generated, networks, randomise
from tests.kit.networks import ConvNet, images, mlp, randomise_gates


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-300))


def plain(module: nn.Module) -> bool:
    for m in module.modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks:
            return False
        if type(m).__module__.startswith("plasticnet") and not isinstance(m, Take):
            return False
    return True


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    model=networks,
    k=st.sampled_from([0.0, 0.5, 7.0, math.inf]),
    inputs=st.sampled_from([(), ("fc1",), ("fc*",)]),
    seed=st.integers(0, 2**20),
    closed=st.sampled_from([0.2, 0.5, 0.9]),
)
def test_compact_equals_eval(model: Generated, k: float, inputs: tuple[str, ...], seed: int, closed: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    net = PlasticNet(randomise(model), (x,), inputs=inputs)
    assert "fc2" in net.frozen
    randomise_gates(net, closed)
    net.k = k
    net.eval()
    small = net.compact()
    assert plain(small)
    assert error(net(x), small(x)) <= 1e-9
    summary = net.summary()
    if k != 0 and all(s.open > 0 for s in summary.sites):
        features = net.sites.get("fc1.input")
        if features is None:
            assert sum(p.numel() for p in small.parameters()) == summary.open_parameters
        else:
            assert sum(p.numel() for p in small.parameters()) <= summary.parameters
    # And what remains can be resized again: growing leaves the outputs alone.
    before = net(x)
    net.prune(0.5)
    net.grow({n: 1 for n, s in net.sites.items() if s.units.growable and not n.endswith(".input")})
    assert error(before, net(x)) <= 1e-9
    assert error(before, net.compact()(x)) <= 1e-9


def test_compact_is_a_copy_and_trains() -> None:
    model = ConvNet()
    net = PlasticNet(model, (images(),), inputs=("fc1",))
    randomise_gates(net)
    small = net.compact()
    assert isinstance(small.get_submodule("fc1"), nn.Sequential)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()
    small(images()).pow(2).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert all(p.grad is not None for p in small.parameters())


def test_a_channel_whose_features_are_all_closed_is_cut() -> None:
    net = PlasticNet(ConvNet(norm=False), (images(),), inputs=("fc1",))
    with torch.no_grad():  # conv3 makes the last 16 of the 40 features
        net.sites["fc1.input"].phi[28:32] = -1.0
    small = net.compact()
    assert small.get_parameter("conv3.weight").shape[0] == 3
    net.eval()
    x = images()
    torch.testing.assert_close(net(x), small(x))


@pytest.mark.parametrize("multiple_of", [1, 2])
def test_the_last_features_keep_their_producer(multiple_of: int) -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",)).double()
    net.resize({"fc1.input": [20, 21, 22, 23]})  # those of the last channel of conv1
    with torch.no_grad():
        net.sites["conv1"].phi[3:] = -1.0
        net.sites["conv1"].phi[5] = -2.0
    x = images().double()
    before = net.eval()(x)
    assert error(before, net.compact(multiple_of)(x)) <= 1e-9
    net.prune(0.5, multiple_of=multiple_of)
    assert error(before, net(x)) <= 1e-9
    assert (len(net.sites["conv1"]), len(net.sites["fc1.input"])) == (4, 4)


def test_a_site_with_every_unit_closed_keeps_one_of_weight_zero() -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",)).double()
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.fill_(-1.0)
    net.eval()
    x = images().double()
    small = net.compact()
    assert error(net(x), small(x)) <= 1e-9
    assert small.get_parameter("conv2.weight").shape[1] == 1


def test_dtypes_and_memory_format_survive() -> None:
    model = ConvNet().to(memory_format=torch.channels_last)
    net = PlasticNet(model, (images(),))
    randomise_gates(net)
    small = net.compact()
    assert small.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)
    half = PlasticNet(ConvNet(norm=False).bfloat16(), (images().bfloat16(),))
    randomise_gates(half)
    assert half.sites["conv1"].phi.dtype == torch.float32
    assert half.compact()(images().bfloat16()).dtype == torch.bfloat16


def test_consumer_that_no_module_call_reads_is_gated_through_its_weight() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)
            self.w = nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).tanh() @ self.w.t()

    net = PlasticNet(Functional().double(), (torch.randn(5, 4, dtype=torch.float64),))
    assert list(net.sites) == ["a"]
    net.k = 2.0
    randomise_gates(net)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert error(net.eval()(x), net.compact()(x)) <= 1e-9
    net.train()
    (net.expected_loss(lambda: net(x).pow(2).sum(1))).backward()
    assert net.sites["a"].phi.grad is not None


def test_exclude_and_unknown_operation() -> None:
    net = PlasticNet(ConvNet(), (images(),), exclude=("conv*",))
    assert list(net.sites) == ["fc1"]
    assert net.excluded == ("conv1", "conv3")
    with pytest.raises(PlasticError):
        PlasticNet(ConvNet(), (images(),), exclude=("*",))


# -- widths that are multiples ----------------------------------------------------------------


class Residual(nn.Module):
    """A residual stream of 24, blocks with BatchNorm, and grouped and depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.bn = nn.BatchNorm2d(24)
        self.a = nn.Sequential(nn.Conv2d(24, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 24, 1))
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.narrow = nn.Conv2d(24, 6, 1)
        self.grouped = nn.Sequential(nn.Conv2d(24, 32, 1), nn.Conv2d(32, 48, 3, padding=1, groups=16), nn.ReLU())
        self.fc = nn.Linear(48 + 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = x + self.a(x)
        x = x + self.depthwise(x)
        x = torch.cat([self.grouped(x), self.narrow(x)], 1)
        return self.fc(x.mean((2, 3)))


class Wide(nn.Module):
    """Convolutions, and a layer whose input features are gated one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.conv2 = nn.Conv2d(20, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 4, 30)
        self.fc2 = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.bn1(self.conv1(x)).relu()).relu()
        return self.fc2(self.fc1(nn.functional.max_pool2d(x, 2).flatten(1)).tanh())


class Heads(nn.Module):
    """Attention between layer norms: six heads of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 24)
        self.norm = nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 6, batch_first=True, kdim=24, vdim=24)
        self.mlp = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).mT)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.mlp(self.norm(x))).mean(1)


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Flatten(), *mlp(48, 40, 7, 2)), {}),
    "features": (Wide, {"inputs": ("fc1",)}),
    "residual": (Residual, {}),
    "norms": (Heads, {"residual": True}),
}


@pytest.mark.parametrize("k", [7.0, math.inf])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("closed", [0.3, 0.8])
def test_widths_are_multiples_and_the_outputs_the_same(name: str, k: float, closed: float) -> None:
    build, options = NETWORKS[name]
    model = build().double()
    net = PlasticNet(model, (images().double(),), **options)
    for module in model.modules():  # statistics as after training
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    randomise_gates(net, closed)
    net.k = k
    before = {n: len(s) for n, s in net.sites.items()}
    x = images(8).double()
    exact, padded = net.compact(), net.compact(multiple_of=8)
    expected = net.eval()(x)
    assert error(expected, exact(x)) <= 1e-9
    assert error(exact(x), padded(x)) <= 1e-9
    assert plain(padded) or name == "norms"  # attention has become a class of ours
    opened = {n: int(s.open.sum()) for n, s in net.sites.items()}
    shapes = {n: p.shape for n, p in padded.named_parameters()}
    for site in net.sites.values():
        for s in site.units.slices:
            kept = [n for n in (s.tensor, _behind_take(s.tensor)) if n in shapes]
            if not kept:
                continue
            width, full = shapes[kept[0]][s.dim], net.get_parameter(f"model.{s.tensor}").shape[s.dim]
            owned = sum(
                t.index.shape[1] * len(o) for o in net.sites.values() for t in o.units.slices
                if (t.tensor, t.dim) == (s.tensor, s.dim)
            )  # fmt: skip
            if site.units.norms:  # nothing closed stays in a norm
                assert width == opened[site.name] * s.index.shape[1]
            elif owned == full and full % 8 == 0:
                assert width % 8 == 0, (s.tensor, s.dim, width)
    # The same in training: what stays are the likeliest, and they stay closed.
    values = {n: s.probability(net.k).detach() for n, s in net.sites.items()}
    net.prune(0.5, multiple_of=8)
    assert error(expected, net(x)) <= 1e-9
    for name, site in net.sites.items():
        assert int(site.open.sum()) == opened[name] or "input" in name  # open features of cut channels go
        likely = values[name].sort(descending=True).values[: len(site)]
        if "input" not in name:
            torch.testing.assert_close(site.probability(k).detach().sort(descending=True).values, likely)
        if before[name] % 8 == 0 and not site.units.norms and all(s.index.shape[1] == 1 for s in site.units.slices):
            assert len(site) % 8 == 0
            assert len(site) - int(site.open.sum()) < 8


def _behind_take(tensor: str) -> str:
    owner, _, leaf = tensor.rpartition(".")
    return f"{owner}.1.{leaf}"


def test_a_site_that_has_no_multiple_is_cut_as_far_as_it_goes() -> None:
    net = PlasticNet(nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2)), (torch.randn(2, 4),))
    for closed, width in ((0, 12), (1, 11), (4, 8), (5, 8), (11, 8)):
        with torch.no_grad():
            net.sites["0"].phi.copy_((torch.arange(12) >= closed).float() - 0.5)
        assert net.compact(multiple_of=8)[0].out_features == width  # pyright: ignore[reportIndexIssue]
    assert net.prune(0.5, multiple_of=8) == {"0": 4}
    assert net.sites["0"].open.sum() == 1
    net.prune(0.5, multiple_of=16)
    assert len(net.sites["0"]) == 1


def test_heads_count_by_their_width() -> None:
    net = PlasticNet(Heads().double(), (images().double(),))
    heads = net.sites["attention"]
    with torch.no_grad():
        heads.phi[[0, 2, 4]] = -1.0
    assert net.compact(multiple_of=4).get_submodule("attention").num_heads == 3  # 12 is a multiple
    assert net.compact(multiple_of=8).get_submodule("attention").num_heads == 4  # 16
    assert net.compact().get_submodule("attention").num_heads == 3


@pytest.mark.parametrize("multiple_of", [0, -8, 8.0, True, "8"])
def test_bad_multiples(multiple_of: Any) -> None:
    net = PlasticNet(ConvNet(), (images(),))
    for call in (net.prune, net.compact):
        with pytest.raises(PlasticError, match="multiple_of"):
            call(multiple_of=multiple_of)


class Normed(nn.Module):
    """A norm whose channels several layers read, each through features of its own."""

    def __init__(self, readers: int, width: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(2, width, 1), nn.GroupNorm(1, width)
        self.readers = nn.ModuleList(nn.Linear(2 * width, 3) for _ in range(readers))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).flatten(1)
        return torch.stack([reader(h) for reader in self.readers]).sum(0)


@pytest.mark.parametrize("k", [math.inf, 5.0])
@pytest.mark.parametrize(
    ("width", "features", "opened"),
    [
        (3, [[4], [0, 1, 2, 3, 4, 5]], [[1], [0, 0, 1, 1, 1, 0]]),  # the second has lost none that could come back
        (3, [[4, 5], [0, 4]], [[1, 0], [0, 1]]),
        (4, [[7], [0, 1, 3, 7], [1, 2, 7]], [[1], [0, 0, 1, 1], [0, 0, 1]]),
        (3, [[5], [2, 3, 4, 5]], [[1], [1, 1, 1, 1]]),
    ],
)
def test_the_last_open_features_belong_to_channels_that_a_norm_no_longer_counts(
    width: int, features: list[list[int]], opened: list[list[int]], k: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 2)
    net = PlasticNet(Normed(len(features), width), (x,), inputs=["readers.*"], residual=True).double()
    x = x.double()
    net.resize({f"readers.{i}.input": f for i, f in enumerate(features)})
    net.k = k
    with torch.no_grad():
        net.sites["a"].phi[1:] = -1.0
        for i, z in enumerate(opened):
            net.sites[f"readers.{i}.input"].phi.copy_(torch.tensor(z) - 0.5)
    small, expected = net.compact(), net.eval()(x)
    assert error(expected, small(x)) <= 1e-12
    assert small.a.out_channels == 1
    net.prune(0.5)
    assert error(expected, net(x)) <= 1e-12
    assert error(expected, net.compact()(x)) <= 1e-12
