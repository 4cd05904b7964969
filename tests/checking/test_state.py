"""Models that keep something from one call to the next: hidden states, membranes, caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn

BATCH, WIDTH = 4, 16


class Stream(nn.Module):
    """A recurrent network that gets one time step in each call.

    Args:
        step: It gets the module and an input, and returns the new hidden values.
        buffers: The shape of each buffer, or None for one that is not there yet.
    """

    def __init__(self, step: Callable[[Any, Tensor], Tensor], **buffers: tuple[int, ...] | None) -> None:
        super().__init__()
        self.a, self.c, self.o = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.cell, self.conv = nn.LSTMCell(WIDTH, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3)
        self.step, self.kept = step, None
        for name, shape in buffers.items():
            self.register_buffer(name, None if shape is None else torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.step(self, x))


def rebind(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x) + s.c(s.h))
    s.h = h.detach()
    return h


def write(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x) + s.c(s.h))
    s.h.copy_(h.detach())
    return h


def only_write(s: Any, x: Tensor) -> Tensor:
    s.h = s.c(s.a(x).tanh())
    return s.h


def leak(s: Any, x: Tensor) -> Tensor:
    s.h = 0.9 * s.h + s.a(x).detach()
    spikes = (s.h > 0.5).to(x.dtype)
    s.h = s.h - spikes
    return s.c(spikes + 0.1 * s.h)


def cells(s: Any, x: Tensor) -> Tensor:
    s.h, s.g = s.cell(s.a(x), (s.h, s.g))
    return s.h


def window(s: Any, x: Tensor) -> Tensor:
    seen = torch.cat([s.h, s.a(x)[:, None]], 1)
    s.h = seen[:, 1:]
    return s.conv(seen.transpose(1, 2))[..., 0].tanh()


def replace_data(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x) + s.c(s.h))
    s.h.data = h.detach()
    return h


def attribute(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x) + (0 if s.kept is None else s.c(s.kept)))
    s.kept = h.detach()
    return s.conv(h[..., None].expand(-1, -1, 3))[..., 0]


def lazily(s: Any, x: Tensor) -> Tensor:
    if s.h is None or len(s.h) != len(x):
        s.h = x.new_zeros(len(x), s.c.in_features)
    return s.conv(rebind(s, x)[..., None].expand(-1, -1, 3))[..., 0]


def differences(model: nn.Module) -> list[float]:
    """How far masked, cut and compact networks are apart in several calls in a row, with a state that was not zero."""
    x = [torch.randn(BATCH, 6).double() for _ in range(7)]
    net = pn.PlasticNet(model.double(), (x[0],))
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[torch.randperm(len(site))[: len(site) // 2]] = -1
        net.eval()
        for value in x[:2]:
            net(value)
        small = net.compact()
        found = [(net(value) - small(value)).abs().max().item() for value in x[2:5]]
        net.prune()
        return found + [(net(value) - small(value)).abs().max().item() for value in x[5:]]


HIDDEN = (BATCH, WIDTH)
EXACT: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "rebound": (rebind, {"h": HIDDEN}),
    "written to": (write, {"h": HIDDEN}),
    "written to, never read": (only_write, {"h": HIDDEN}),
    "a single row at first": (rebind, {"h": (1, WIDTH)}),
    "membrane": (leak, {"h": HIDDEN}),
    "two states of a cell": (cells, {"h": HIDDEN, "g": HIDDEN}),
    "window": (window, {"h": (BATCH, 2, WIDTH)}),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_buffer_follows_the_units_in_every_call(name: str) -> None:
    step, buffers = EXACT[name]
    assert max(differences(Stream(step, **buffers))) <= 1e-9


@pytest.mark.parametrize(("step", "buffers", "reason"), [
    (attribute, {}, "kept, which is no buffer.*register_buffer"),
    (lazily, {"h": None}, "h, which is a buffer of another shape: call the model once before"),
])  # fmt: skip
def test_what_cannot_be_cut_is_frozen_with_the_way_out(step: Any, buffers: Any, reason: str) -> None:
    net = pn.PlasticNet(Stream(step, **buffers), (torch.randn(BATCH, 6),))
    assert list(net.sites) == ["conv"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(net.frozen["a"])
    assert max(differences(Stream(step, **buffers))) <= 1e-9


def test_after_a_first_call_the_shape_is_known() -> None:
    model = Stream(lazily, h=None)
    model(torch.randn(BATCH, 6))
    assert list(pn.PlasticNet(model, (torch.randn(BATCH, 6),)).sites) == ["a", "conv"]
    assert max(differences(model)) <= 1e-9


def test_data_that_are_replaced_are_found_by_the_self_check() -> None:
    with pytest.raises(pn.PlasticError, match="a: the model does not run when units are cut"):
        pn.PlasticNet(Stream(replace_data, h=HIDDEN), (torch.randn(BATCH, 6),))


def test_branches_of_the_second_call_are_traced() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            layer = self.b if self.calls % 2 else self.c
            return self.o(layer(self.a(x)).relu())

    assert max(differences(Alternating())) <= 1e-9


def test_a_state_goes_into_a_fresh_network() -> None:
    x = torch.randn(BATCH, 6).double()
    net = pn.PlasticNet(Stream(rebind, h=HIDDEN).double(), (x,))
    with torch.no_grad():
        net.sites["a"].phi[:5] = -1
        net.prune()
        net.eval()(x)
        other = pn.PlasticNet(Stream(rebind, h=HIDDEN).double(), (x,)).eval()
        other.load_state_dict(net.state_dict())
        assert torch.equal(net(x), other(x))
