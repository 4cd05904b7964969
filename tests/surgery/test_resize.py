"""Resize: growth and pruning in one call, with the optimizers' state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, RMSprop

from plasticnet import PlasticError, PlasticNet
from plasticnet.surgery.plan import positions
from plasticnet.surgery.rewrite import rewrite
from plasticnet.units import Slice
from tests.kit.networks import ConvNet, images, mlp

OPTIMIZERS: dict[str, Callable[[Iterable], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adam": Adam,
    "amsgrad": lambda groups: Adam(groups, amsgrad=True),
    "adamw": AdamW,
    "rmsprop": RMSprop,
}


def step(net: PlasticNet, optimizers: list[Optimizer], x: Tensor) -> None:
    net.train()
    y = torch.arange(len(x)) % 3
    loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + net.penalty(1e-3)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_prune_and_grow_in_one_call_carries_state(name: str) -> None:
    net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
    net.k = 3.0
    optimizer = OPTIMIZERS[name](net.param_groups(1e-2, 1e-2))
    x = images(8)
    for _ in range(3):
        step(net, [optimizer], x)
    before = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    moments = {n: _moments(optimizer, p) for n, p in net.model.named_parameters()}
    phi = net.sites["conv3"].phi.detach().clone()
    net.resize({"conv3": [0, 2, -1, 3, -1], "fc1": [1, 2, 5]}, optimizer)
    assert net.model.conv3.weight.shape == (5, 6, 1, 1)
    kept, places = [0, 2, 3], [0, 1, 3]
    assert torch.equal(net.model.conv3.weight[places], before["conv3.weight"][kept])
    assert torch.equal(net.sites["conv3"].phi[places], phi[kept])
    assert torch.equal(net.model.fc2.weight, before["fc2.weight"][:, [1, 2, 5]])
    for key, value in _moments(optimizer, net.model.conv3.weight).items():
        assert torch.equal(value[places], moments["conv3.weight"][key][kept])
        fresh = value[[2, 4]]
        if key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg"):
            expected = moments["conv3.weight"][key][kept].mean(0).expand_as(fresh)
            torch.testing.assert_close(fresh, expected)
        else:
            assert (fresh == 0).all()
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in net.parameters()}
    assert set(optimizer.state) <= set(net.parameters())
    values = {n: p.detach().clone() for n, p in net.named_parameters()}
    step(net, [optimizer], x)
    for n, p in net.named_parameters():
        assert p.grad is not None, n
        assert p.grad.shape == p.shape
        behind_norm = n == "model.conv1.bias"  # its gradient is a rounding error
        assert behind_norm or not torch.equal(p, values[n]), f"{n} does not learn"


def _moments(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape}


def test_several_optimizers() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),))
    net.k = 3.0
    weights, gates = net.param_groups(1e-2)
    optimizers = [torch.optim.SGD([weights], momentum=0.9), Adam([gates])]
    x = torch.randn(6, 4)
    step(net, optimizers, x)
    with pytest.raises(PlasticError, match="do not hold the gates"):
        net.resize({"0": [0, 1]}, optimizers[0])
    assert len(net.sites["0"]) == 6
    net.resize({"0": [0, 1, -1]}, optimizers)
    step(net, optimizers, x)
    assert net.model[0].weight.shape == (3, 4)


def test_a_live_graph_of_the_old_shape_does_no_harm() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    x = torch.randn(6, 4)
    alive = net(x).sum()
    net.resize({"0": [0, 1]}, optimizer)
    step(net, [optimizer], x)
    alive.backward()


@pytest.mark.parametrize("inputs", [(), ("fc1",)])
def test_function_preserving_growth(inputs: tuple[str, ...]) -> None:
    model = ConvNet()
    net = PlasticNet(model, (images(),), inputs=inputs)
    x = images(8)
    net.train()
    net(x)
    net.eval()
    before = net(x)
    net.grow({n: 2 for n in net.sites if not n.endswith(".input")})
    assert len(net.sites["conv1"]) == 8
    assert (net(x) - before).abs().max() <= 1e-6 * before.abs().max()
    again = net(x)
    net.grow({"conv3": 1}, init="random")
    assert (net(x) - again).abs().max() > 1e-6


def test_round_trip_restores_the_function() -> None:
    net = PlasticNet(ConvNet(), (images(),))
    x = images()
    net.eval()
    before = net(x)
    sizes = {n: len(s) for n, s in net.sites.items()}
    net.grow(dict.fromkeys(sizes, 3))
    net.resize({n: list(range(size)) for n, size in sizes.items()})
    assert torch.equal(net(x), before)


def test_input_site_reopens_only_closed_features() -> None:
    net = PlasticNet(mlp(8, 6, 3), (torch.randn(2, 8),), inputs=("*",))
    net.resize({"0.input": [1, 4, 5]})
    assert net.sites["0.input"].features.tolist() == [1, 4, 5]  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.randn(5, 8)
    torch.testing.assert_close(net(x), net.model[2](net.model[1](net.model[0](x[:, [1, 4, 5]]))))
    net.resize({"0.input": [0, -1, 2]})
    features = net.sites["0.input"].features.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(features) == 3
    assert {1, 5} < set(features)
    assert set(features) - {1, 5} <= {0, 2, 3, 4, 6, 7}
    with pytest.raises(PlasticError, match="has 8 features"):
        net.resize({"0.input": [0, 1, 2, *[-1] * 6]})


def test_channel_and_feature_sites_together() -> None:
    net = PlasticNet(ConvNet(norm=False), (images(),), inputs=("fc1",))
    assert len(net.sites["fc1.input"]) == 40
    net.resize({"conv3": [0, 1, 3]})
    assert len(net.sites["fc1.input"]) == 36
    net.resize({"conv3": [0, 1, 2, -1], "fc1.input": list(range(0, 36, 2))})
    assert len(net.sites["fc1.input"]) == 22  # 18 kept, and the 4 features of the new channel
    assert net(images()).shape == (4, 3)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"nope": [0]}, "no site 'nope'"),
        ({"conv1": [0, 6]}, "has 6 units"),
        ({"conv1": [-2]}, "has 6 units"),
        ({"conv1": []}, "keep at least one"),
        ({"conv1": [2, 1]}, "increasing"),
        ({"conv1": [1, 1]}, "increasing"),
    ],
)
def test_bad_sources_change_nothing(sources: dict, message: str) -> None:
    net = PlasticNet(ConvNet(), (images(),))
    before = {n: (id(p), p.detach().clone()) for n, p in net.named_parameters()}
    with pytest.raises(PlasticError, match=message):
        net.resize({"fc1": [0, 1], **sources})
    for n, p in net.named_parameters():
        assert id(p) == before[n][0]
        assert torch.equal(p, before[n][1])


def test_optimizer_with_other_state_is_refused_by_name() -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    step(net, [optimizer], torch.randn(4, 4))
    optimizer.state[net.model[0].weight]["blocks"] = torch.zeros(5)
    with pytest.raises(PlasticError, match=r"Adam keeps state 'blocks' of shape \(5,\) for 0.weight"):
        net.resize({"0": [0, 1]}, optimizer)
    assert len(net.sites["0"]) == 6


def test_keeps_flags_and_memory_format() -> None:
    model = ConvNet().to(memory_format=torch.channels_last)
    model.conv2.weight.requires_grad_(False)
    net = PlasticNet(model, (images(),))
    net.resize({"conv1": [0, 1, 2, -1]})
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv2.weight.requires_grad
    assert model.conv1.weight.requires_grad
    assert (model.conv1.out_channels, model.conv2.in_channels, model.bn1.num_features) == (4, 4, 4)
    assert model.fc1.in_features == 4 * (4 + 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolution_loses_whole_groups(transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 12, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1))
    net = PlasticNet(model, (images(),))
    assert len(net.sites["0"]) == 4
    net.resize({"0": [0, 2, 3, -1]})
    assert model[1].groups == 4
    net.resize({"0": [1, 2]})
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (2, 4, 6)
    assert net(images()).shape == (4, 2, 4, 4)


@pytest.mark.parametrize("seed", range(30))
def test_positions_one_after_the_other(seed: int) -> None:
    """Sites with several stretches along one dimension, in any order, and positions that nobody owns."""
    rng = np.random.default_rng(seed)
    sizes = {name: int(rng.integers(1, 6)) for name in "abc"}
    runs = {name: tuple(rng.integers(1, 4, rng.integers(1, 4)).tolist()) for name in sizes}
    stretches = [(name, i) for name in sizes for i in range(len(runs[name]))]
    length, parts = int(rng.integers(3)), {}
    for name, i in [stretches[j] for j in rng.permutation(len(stretches))]:
        parts[name, i] = length + np.arange(sizes[name] * runs[name][i]).reshape(sizes[name], -1)
        length += parts[name, i].size + int(rng.integers(2))
    owners = [
        (n, Slice("weight", 0, np.concatenate([parts[n, i] for i in range(len(runs[n]))], 1), runs[n])) for n in sizes
    ]
    sources = {}
    for name in list(sizes)[: rng.integers(1, 4)]:
        kept = np.flatnonzero(rng.random(sizes[name]) < 0.6).tolist()
        for _ in range(rng.integers(0 if kept else 1, 4)):
            kept.insert(rng.integers(len(kept) + 1), -1)
        sources[name] = np.array(kept)
    take, index = positions(owners, sources, length)
    expected_take, expected_index = _positions_by_hand(owners, sources, length)
    assert take.tolist() == expected_take
    assert {name: i.tolist() for name, i in index.items()} == expected_index


def _positions_by_hand(
    owners: list[tuple[str, Slice]], sources: Mapping[str, np.ndarray], length: int
) -> tuple[list[int], dict[str, list[list[int]]]]:
    alive = set(range(length))
    follow: dict[float, list[tuple[str, int, int]]] = {}  # a position, to the new ones after it: site, unit, column
    for name, s in owners:
        if name in sources:
            gone = set(range(len(s.index))) - set(sources[name].tolist())
            alive -= {p for unit in gone for p in s.index[unit].tolist()}
            for end, run in zip(np.cumsum(s.runs), s.runs, strict=True):
                last = s.index[0, end - run] - 0.5
                for new, old in enumerate(sources[name]):
                    if old >= 0:
                        last = s.index[old, end - 1]
                    else:
                        follow.setdefault(last, []).extend((name, new, c) for c in range(end - run, end))
    take: list[int] = []
    where: dict[object, int] = {}
    for p in sorted(alive | follow.keys()):
        for entry in [*([p] if p in alive else []), *follow.get(p, [])]:
            where[entry] = len(take)
            take.append(-1 if isinstance(entry, tuple) else entry)
    index = {}
    for name, s in owners:
        old = sources.get(name, np.arange(len(s.index)))
        columns = range(s.index.shape[1])
        index[name] = [
            [where[s.index[o, c] if o >= 0 else (name, new, c)] for c in columns] for new, o in enumerate(old)
        ]
    return take, index


TAKES = {
    "all": [0, 1, 2, 3, 4],
    "first": [0, 1],
    "some": [0, 2, 3],
    "added at the end": [0, 1, 2, 3, 4, -1, -1],
    "added at the beginning": [-1, 0, 1, 2, 3, 4],
    "added between": [0, -1, 1, 2, -1, 3, 4, -1],
    "some, and added": [1, 2, 4, -1, -1],
    "some, and added between": [2, -1, 4],
    "new": [-1, -1, -1],
}


@pytest.mark.parametrize("second", TAKES)
@pytest.mark.parametrize("first", TAKES)
def test_rewrite_one_position_after_the_other(first: str, second: str) -> None:
    takes = {0: np.array(TAKES[first]), 1: np.array(TAKES[second])}
    dense, image = torch.rand(5, 5, dtype=torch.float64), torch.rand(5, 5, 3, 2, dtype=torch.float64)
    for tensor in (dense, dense.T, image, image.to(memory_format=torch.channels_last)):
        for mean in (False, True):
            new = rewrite(tensor, takes, mean)
            expected = tensor
            for dim, take in takes.items():
                old = expected.unbind(dim)
                kept = [old[i] for i in take if i >= 0]
                fresh = torch.stack(kept).mean(0) if mean and kept else torch.zeros_like(old[0])
                expected = torch.stack([old[i] if i >= 0 else fresh for i in take], dim)
            torch.testing.assert_close(new, expected, rtol=1e-12 if mean else 0, atol=0)
            last = not tensor.is_contiguous() and tensor.dim() == 4
            assert new.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            assert new.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
            assert new.untyped_storage().nbytes() == new.numel() * new.element_size()  # no view of something larger
