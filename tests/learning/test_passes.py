"""The second pass is spared where the draws agree, and the gradient stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import PlasticNet
from plasticnet.learning import passes
from tests.kit.draws import last_draw


class Rows(nn.Module):
    """Remembers how many rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x


class Masked(nn.Module):
    """Two inputs with an entry per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.body(x * mask)


def network(*first: nn.Module) -> nn.Sequential:
    return nn.Sequential(*first, nn.Linear(6, 8), nn.Tanh(), Rows(), nn.Linear(8, 3))


def nearly_certain(model: nn.Module, *x: Tensor, phi: float) -> PlasticNet:
    """All gates but two are certain; these are open with probability sigmoid(phi)."""
    net = PlasticNet(model, x, estimator="disarm")
    net.k = 1.0
    net.train()
    with torch.no_grad():
        (site,) = net.sites.values()
        site.phi.fill_(100.0)
        site.phi[:2] = phi
        site.phi[7] = -100.0
    return net


def gradients(net: PlasticNet, closure: Callable[[], Tensor]) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(4)
    loss = net.expected_loss(closure)
    loss.backward()
    return [p.grad for p in net.parameters() if p.grad is not None] + [torch.get_rng_state()]


def rows_of(model: nn.Module) -> list[int]:
    return next(m for m in model.modules() if isinstance(m, Rows)).seen


def both(net: PlasticNet, closure: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Check a step against one with a whole second pass; returns the rows that the network saw in it."""
    gradients(net, closure)  # whether samples are apart is found out once
    seen = rows_of(net.model)
    seen.clear()
    found = gradients(net, closure)
    rows = list(seen)
    monkeypatch.setattr(passes, "check_alike", lambda *_: None)
    for one, other in zip(found, gradients(net, closure), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert any(bool(s.phi.grad.any()) for s in net.sites.values() if s.phi.grad is not None) or len(rows) == 1
    return rows


def test_only_the_samples_whose_gates_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    net = nearly_certain(network(), x[:2], phi=2.5)
    rows = both(net, lambda: F.cross_entropy(net(x), y, reduction="none"), monkeypatch)
    assert rows[0] == 64
    assert 0 < rows[1] <= 32
    assert net.sampler.rows_apart


def test_none_when_all_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    net = nearly_certain(network(), x[:2], phi=12.0)  # uncertain, yet 64 samples hardly ever see it
    assert both(net, lambda: F.cross_entropy(net(x), y, reduction="none"), monkeypatch) == [64]


def test_none_when_one_draw_for_all_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 6)
    net = nearly_certain(network(nn.BatchNorm1d(6)), x, phi=12.0)
    before = net.model[0].running_mean.clone()  # pyright: ignore[reportIndexIssue]
    assert both(net, lambda: net(x).square().mean(), monkeypatch) == [64]
    assert not torch.equal(before, net.model[0].running_mean)  # pyright: ignore[reportIndexIssue]


def test_all_where_most_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 6)
    net = nearly_certain(network(), x[:2], phi=0.0)
    assert both(net, lambda: net(x).square().sum(1), monkeypatch) == [64, 64]


def test_all_where_random_numbers_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 6)
    net = nearly_certain(network(nn.Dropout(0.5)), x[:2], phi=2.5)
    assert both(net, lambda: net(x).square().sum(1), monkeypatch) == [64, 64]
    assert net.sampler.samples_apart  # dropout does not join samples


def test_all_where_there_is_more_than_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = torch.randn(64, 6), torch.rand(64, 6).round()
    net = nearly_certain(Masked(), x[:2], mask[:2], phi=2.5)
    assert both(net, lambda: net(x, mask).square().sum(1), monkeypatch) == [64, 64]


def test_all_where_the_loss_joins_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 6)
    net = nearly_certain(network(), x[:2], phi=2.5)

    def closure() -> Tensor:
        out: Any = net(x)
        return (out * out.mean(0)).sum(1)  # found out by the probe: then the gates are drawn per batch

    gradients(net, closure)
    assert net.sampler.samples_apart is False
    assert last_draw(net) is not None
    assert last_draw(net).rows == 1


@dataclass
class Out:
    out: Tensor


class Answer(nn.Module):
    """An output that is a tensor per sample only in part."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body = network()

    def forward(self, x: Tensor) -> Any:
        out = self.body(x)
        return {
            "scalar": lambda: (out, out.square().mean()),
            "object": lambda: Out(out),
            "list": lambda: list(out),
            "sizes": lambda: out.view(64, 3),
        }[self.kind]()


@pytest.mark.parametrize("kind", ["scalar", "object", "list", "sizes"])
def test_all_where_the_output_cannot_be_put_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    net = nearly_certain(Answer(kind), x, phi=2.5)

    def closure() -> Tensor:
        out = net(x)
        out = {"scalar": lambda: out[0], "object": lambda: out.out, "list": lambda: torch.stack(out)}.get(
            kind, lambda: out
        )()
        return F.cross_entropy(out, y, reduction="none")

    both(net, closure, monkeypatch)
    assert net.sampler.rows_apart is False


def test_nothing_is_concluded_while_nothing_moves() -> None:
    """A head that starts at zero: no gate changes any output, so it cannot be seen whether samples interact."""

    class Interacting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            nn.init.zeros_(self.last.weight)

        def forward(self, x: Tensor) -> Tensor:
            out = self.last(self.first(x).tanh())
            return out - out.mean(0)

    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    net = PlasticNet(Interacting(), (x,))
    net.k = 2.0
    net.train()
    gradients(net, lambda: F.cross_entropy(net(x), y, reduction="none"))
    assert net.sampler.samples_apart is None
    with torch.no_grad():
        net.model.last.weight.normal_()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    gradients(net, lambda: F.cross_entropy(net(x), y, reduction="none"))
    assert net.sampler.samples_apart is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("gates", ["sample", "batch"])
def test_a_step_on_a_gpu_does_not_wait(gates: Any) -> None:
    net = PlasticNet(network(nn.BatchNorm1d(6)).cuda(), torch.randn(2, 6).cuda(), gates=gates)
    optimizer = torch.optim.Adam(net.param_groups(1e-3))
    x, y = torch.randn(64, 6).cuda(), torch.randint(0, 3, (64,)).cuda()
    net.train()
    for k in (float("inf"), 2.0):
        net.k = k
        for waits in ("default", "error", "error"):
            torch.cuda.set_sync_debug_mode(waits)
            try:
                loss = net.expected_loss(lambda: F.cross_entropy(net(x), y, reduction="none")) + net.penalty(1e-3)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
