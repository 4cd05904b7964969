"""A training step that runs under autocast as a whole: what the library computes by itself does not know of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from plasticnet import Budget, PlasticNet, Schedule, Stage
from plasticnet.apps.data import load_data
from plasticnet.apps.models import MLP
from tests.kit.networks import ConvNet, assert_same, images, mlp


def gradients(net: PlasticNet) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_costs_do_not_know_autocast(dtype: torch.dtype, backward_inside: bool) -> None:
    """Multiply-adds are above 65,504, where half precision ends."""
    net = PlasticNet(mlp(64, 600, 600, 10), (torch.randn(2, 64),), weights=("4",))
    net.k = 7.0
    found = []
    for cast in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", dtype, enabled=cast):
            parts = [net.penalty(1.0, cost, scale) for cost in ("macs", "parameters") for scale in ("linear", "log")]  # pyright: ignore[reportArgumentType]
            total = torch.stack(parts).sum()
            if backward_inside:
                total.backward()
            macs = net.summary().macs
        if not backward_inside:
            total.backward()
        found.append({"total": total.detach(), "macs": torch.tensor(macs), **gradients(net)})
    assert_same(*found)
    assert found[0]["total"] > 300_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_schedule_decides_alike(dtype: torch.dtype) -> None:
    """The budget's multiplier, its pressure, what hibernates and what stays."""
    ends = []
    for cast in (False, True):
        torch.manual_seed(0)
        net = PlasticNet(mlp(64, 300, 300, 10), (torch.randn(2, 64),))
        optimizer = Adam(net.param_groups(1e-2))
        schedule = Schedule(net, optimizer, [Stage(3, k=7.0), Stage(1)], budget=Budget(macs=0.3, params=0.5))
        penalties = []
        for _ in range(schedule.epochs):
            with torch.no_grad():
                for site in net.sites.values():
                    site.phi.add_(torch.randn_like(site.phi) * 0.5)
            with torch.autocast("cpu", dtype, enabled=cast):
                total = schedule.penalty()
                optimizer.zero_grad()
                if total.requires_grad:
                    total.backward()
                optimizer.step()
                schedule.step()
            penalties.append(total.detach())
        ends.append({**net.state_dict(), "penalties": torch.stack(penalties)})
    assert_same(*ends)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_slopes_are_summed_in_single_precision(backward_inside: bool) -> None:
    """A slope is a sum over 64 positions, and with the scale of the loss it exceeds what half precision holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1))
    net = PlasticNet(model, (torch.randn(2, 1, 8, 8),), gates="sample", estimator="straight-through")
    net.k = 2.0
    net.train()
    x = torch.randn(4, 1, 8, 8)
    found = []
    for cast in (False, True):
        net.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.float16, enabled=cast):
            total = 2e4 * net.expected_loss(lambda: net(x).float().square().flatten(1).sum(1))
            if backward_inside:
                total.backward()
        if not backward_inside:
            total.backward()
        (site,) = net.sites.values()
        assert site.phi.grad is not None
        found.append(site.phi.grad.clone())
    pi = site.probability(2.0).detach()
    assert (found[0] / (2.0 * pi * (1 - pi))).abs().max() > 65_504  # the slope itself
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02 * float(found[0].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_made_under_autocast_has_the_same_sites(dtype: torch.dtype) -> None:
    plain = PlasticNet(ConvNet(), (images(),), weights=("fc*",))
    with torch.autocast("cpu", dtype):
        cast = PlasticNet(ConvNet(), (images(),), weights=("fc*",))
    assert list(cast.sites) == list(plain.sites)
    assert cast.frozen == plain.frozen


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["sample", "batch"])
def test_half_precision_reaches_what_single_precision_does(gates: str) -> None:
    """A whole run on digits with a budget, everything under fp16 autocast and with a scaler."""
    data = load_data("digits")
    x, y = data.train.x, data.train.y

    def run(half: bool) -> tuple[float, float]:
        """Return the accuracy, and the share of the multiply-adds that is left."""
        torch.manual_seed(0)
        net = PlasticNet(MLP([64, 256, 128, 10]), (x[:2],), gates=gates)  # pyright: ignore[reportArgumentType]
        optimizer = Adam(net.param_groups(lr=3e-3, gate_lr=0.1))
        schedule = Schedule(net, optimizer, [Stage(1), Stage(10, k=7.0), Stage(2)], budget=Budget(macs=0.1))
        scaler = torch.amp.GradScaler("cpu", enabled=half)
        whole = net.summary().macs
        for _ in range(schedule.epochs):
            net.train()
            for batch in torch.randperm(len(x)).split(64):
                with torch.autocast("cpu", torch.float16, enabled=half):
                    total = schedule.penalty() + net.expected_loss(
                        lambda batch=batch: F.cross_entropy(net(x[batch]), y[batch], reduction="none")
                    )
                optimizer.zero_grad()
                scaler.scale(total).backward()
                scaler.step(optimizer)
                scaler.update()
            with torch.autocast("cpu", torch.float16, enabled=half):
                schedule.step()
        with torch.no_grad():
            right = net.eval()(data.val.x).argmax(1) == data.val.y
        return float(right.float().mean()), net.summary().macs / whole

    (accuracy, share), (accuracy_in_half, share_in_half) = run(half=False), run(half=True)
    assert accuracy > 0.9
    assert accuracy_in_half > accuracy - 0.03
    assert 0.09 < share_in_half <= 0.1
    assert abs(share_in_half - share) < 0.01
