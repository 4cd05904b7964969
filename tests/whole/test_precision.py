"""Loss scaling, bf16, gradient accumulation and memory formats, each against the plain path."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from plasticnet import PlasticNet, Schedule, Stage
from tests.kit.networks import ConvNet, assert_same, images, mlp, randomise_gates

INF = math.inf
KS = [0.0, 7.0, INF]


def build(k: float, norm: bool = True, **options: object) -> PlasticNet:
    torch.manual_seed(1)
    net = PlasticNet(ConvNet(norm=norm), (images(),), **options)  # pyright: ignore[reportArgumentType]
    randomise_gates(net, 0.3)
    net.k = k
    return net.train()


def loss(net: PlasticNet, x: Tensor, strength: float = 1e-2) -> Tensor:
    y = torch.arange(len(x)) % 3
    return net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + net.penalty(strength)


def gradients(net: PlasticNet) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# -- loss scaling -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", KS)
def test_a_scaler_changes_nothing(k: float) -> None:
    """A power of two scales without rounding: every step is the same to the bit, over resizes too."""
    ends = []
    for scaled in (False, True):
        net = build(k)
        optimizer = Adam(net.param_groups(1e-2))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        for i in range(6):
            optimizer.zero_grad()
            scaler.scale(loss(net, images(6))).backward()
            if i == 2:  # between the backward pass and the step: the gradients come along, scaled as they are
                net.resize({"conv3": [0, 2, 3, -1], "fc1": [0, 1, 5, 6, -1, -1]}, optimizer)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            if i == 4:
                net.prune(0.3, optimizer)
        assert not scaled or scaler.get_scale() == 2.0**13
        ends.append(net.state_dict())
    assert_same(*ends)


def test_a_scaler_skips_a_step_that_overflows() -> None:
    net = build(7.0)
    optimizer = Adam(net.param_groups(1e-2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    scaler.scale(loss(net, images(6), strength=10.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert_same(before, {n: p.detach() for n, p in net.named_parameters()})


# -- bf16 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["sample", "batch"])
@pytest.mark.parametrize("k", KS)
def test_autocast(k: float, gates: str) -> None:
    """The gates' gradients stay in fp32, and all gradients are those of fp32 to the precision of bf16."""
    found = []
    for cast in (False, True):
        net = build(k, norm=False, gates=gates)
        torch.manual_seed(2)
        x = images(32)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            net(x)  # weights are cast and cached outside of expected_loss, too
            total = loss(net, x)
        total.backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())
        found.append(gradients(net))
    plain, cast_ = found
    assert plain.keys() == cast_.keys()
    assert any("phi" in n for n in plain) is (k == 7.0)
    # The estimate is a difference of two losses, each of them rounded.
    for gate, bound in ((False, 0.2), (True, 0.3)):
        both = [
            torch.cat([g.flatten() for n, g in f.items() if ("phi" in n) is gate] or [torch.ones(1)]) for f in found
        ]
        assert (both[1] - both[0]).norm() <= bound * both[0].norm()


def test_a_run_under_autocast_resizes_and_learns() -> None:
    x = torch.randn(128, 8)
    y = (x[:, :3].sum(1) > 0).long()
    net = PlasticNet(mlp(8, 32, 24, 2), (x[:2],))
    optimizer = Adam(net.param_groups(1e-2, 5e-2))
    schedule = Schedule(net, optimizer, [Stage(2), Stage(12, 7.0), Stage(4)], multiple_of=8)
    for _ in range(schedule.epochs):
        net.train()
        for i in range(0, 128, 32):
            with torch.autocast("cpu", torch.bfloat16):
                total = net.expected_loss(
                    lambda i=i: F.cross_entropy(net(x[i : i + 32]).float(), y[i : i + 32], reduction="none")
                ) + net.penalty(0.3, "macs", "log")
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        schedule.step()
    assert all(len(s) % 8 == 0 for s in net.sites.values())
    assert sum(len(s) for s in net.sites.values()) < 32 + 24
    with torch.autocast("cpu", torch.bfloat16):
        accuracy = (net.eval()(x).argmax(1) == y).float().mean()
        agreement = (net(x).float() - net.compact(multiple_of=8)(x).float()).abs().max()
    assert accuracy > 0.9
    assert agreement < 0.1 * net(x).abs().max()


# -- gradient accumulation --------------------------------------------------------------------


def accumulated(net: PlasticNet, batches: list[Tensor], between: Callable[[], None] | None = None) -> dict[str, Tensor]:
    net.zero_grad()
    for i, x in enumerate(batches):
        torch.manual_seed(10 + i)
        loss(net, x).backward()
        if between is not None and i == 0:
            between()
    return gradients(net)


@pytest.mark.parametrize("k", KS)
def test_accumulated_gradients_are_the_sum(k: float) -> None:
    net, batches = build(k), [images(6), images(4), images(7)]
    parts = []
    for i, x in enumerate(batches):
        alone = copy.deepcopy(net).train()
        torch.manual_seed(10 + i)
        loss(alone, x).backward()
        parts.append(gradients(alone))
        net.load_state_dict(net.state_dict())
    together = accumulated(net, batches)
    assert_close(together, {n: sum(p[n] for p in parts) for n in parts[0]})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("k", [7.0, INF])
def test_a_resize_between_accumulations_carries_the_gradients(k: float) -> None:
    """Cutting units that are closed for sure changes no gradient of the others."""
    net = build(k, norm=False, gates="batch")
    with torch.no_grad():
        for site in net.sites.values():  # some closed for sure, the others open for sure
            site.phi.copy_(torch.where(site.open, 30.0, -30.0))
    optimizer = Adam(net.param_groups(1e-2))
    whole = copy.deepcopy(net)
    batches = [images(6), images(6)]
    kept = {n: torch.nonzero(s.open)[:, 0] for n, s in net.sites.items()}
    cut = {n: indices.tolist() for n, indices in kept.items()}
    found = accumulated(net, batches, lambda: net.resize(cut, optimizer))
    expected = accumulated(whole, batches)
    assert found["model.fc2.weight"].shape[1] < expected["model.fc2.weight"].shape[1]
    whole_fc2, whole_conv1 = expected["model.fc2.weight"], expected["model.conv1.weight"]
    whole_conv3 = expected["model.conv3.weight"][kept["conv3"]][:, kept["conv1"]]
    torch.testing.assert_close(found["model.fc2.weight"], whole_fc2[:, kept["fc1"]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["model.conv1.weight"], whole_conv1[kept["conv1"]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["model.conv3.weight"], whole_conv3, rtol=1e-5, atol=1e-6)
    if k == 7.0:
        assert_close(
            {n: g for n, g in found.items() if "phi" in n},
            {n: g[_of(net, kept, n)] for n, g in expected.items() if "phi" in n},
        )
    optimizer.step()


def _of(net: PlasticNet, kept: dict[str, Tensor], phi: str) -> Tensor:
    return next(kept[n] for n, s in net.sites.items() if s.phi is net.get_parameter(phi))


# -- memory format ----------------------------------------------------------------------------


def channels_last(net: nn.Module) -> bool:
    four = [p for p in net.parameters() if p.dim() == 4]
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in four) and bool(four)


@pytest.mark.parametrize("k", KS)
def test_channels_last_is_kept_and_changes_nothing(k: float) -> None:
    ends = []
    for last in (False, True):
        net = build(k)
        if last:
            net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        # Not Adam: it makes full steps of what is rounding noise, the gradient of a bias before BatchNorm.
        optimizer = SGD(net.param_groups(1e-2), momentum=0.9)
        for i in range(4):
            x = images(6)
            x = x.to(memory_format=torch.channels_last) if last else x
            optimizer.zero_grad()
            loss(net, x).backward()
            optimizer.step()
            if i == 0:
                net.prune(0.3, optimizer)
            if i == 1:
                net.grow({"conv1": 2, "conv3": 1}, optimizer)
            if i == 2:
                net.resize({"conv1": [0, 1, -1]}, optimizer)
            if last:
                assert channels_last(net)
                moments = [s["momentum_buffer"] for p, s in optimizer.state.items() if p.dim() == 4]
                assert all(m.is_contiguous(memory_format=torch.channels_last) for m in moments)
        small, padded = net.compact(), net.compact(multiple_of=2)
        assert not last or (channels_last(small) and channels_last(padded))
        ends.append({n: p.detach().contiguous() for n, p in small.named_parameters()})
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, rtol=1e-4, atol=1e-5)
