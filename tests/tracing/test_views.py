"""Layout that is written by hand: padding, writes into views, shuffles, sequences, complex numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import plasticnet as pn


def assert_exact(net: pn.PlasticNet, x: tuple[Tensor, ...]) -> None:
    """Close every second unit, then every unit but the last: cutting is masking."""
    for keep in (slice(1, None, 2), slice(-1, None)):
        with torch.no_grad():
            for site in net.sites.values():
                site.phi.fill_(-1.0)
                site.phi[keep] = 0.3
        masked = net.eval()(*x)
        assert (net.compact()(*x) - masked).abs().max() <= 1e-12 * max(masked.abs().max().item(), 1.0)
        assert (masked - net.model(*x)).abs().max() > 1e-6


class Between(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8, out: int = 8) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, width, 1), between, nn.Conv2d(out, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def padded(x: Tensor, made: Callable[..., Tensor] = torch.zeros) -> Tensor:
    n, c, h, w = x.shape
    out = made(n, c, h + 2, w + 2, dtype=x.dtype)
    out[:, :, 1:-1, 1:-1] = x
    return out


def in_pieces(x: Tensor) -> Tensor:
    """A tensor that is not initialised, filled in two pieces."""
    out = torch.empty_like(x)
    out[:, :, :2] = x[:, :, :2].tanh()
    out[:, :, 2:] = x[:, :, 2:] * 2
    return out


def in_the_middle(x: Tensor) -> Tensor:
    """Channels between some that are always there."""
    n, c, h, w = x.shape
    out = x.new_ones(n, c + 4, h, w)
    out[:, 1 : c + 1] = x
    return out


def beside(x: Tensor) -> Tensor:
    """Channels side by side, written into slices of one tensor."""
    n, c, h, w = x.shape
    out = x.new_zeros(n, 2 * c, h, w)
    out[:, :c] = x
    out[:, c:] = x.tanh()
    return out


def circular(x: Tensor) -> Tensor:
    return F.pad(x, (1, 2, 1, 0), mode="circular")


def cut_up(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)


PIECES: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {  # in between, units, channels behind
    "zeros": (padded, 8, 8),
    "ones": (lambda x: padded(x, torch.ones), 8, 8),
    "new_full": (lambda x: padded(x, lambda *s, dtype: x.new_full(s, 0.5)), 8, 8),
    "empty in pieces": (in_pieces, 8, 8),
    "copy_ into narrow": (lambda x: padded(x * 0).narrow(2, 1, x.shape[2]).copy_(x[..., :1]), 8, 8),
    "a slice of channels": (in_the_middle, 8, 12),
    "circular": (circular, 8, 8),
    "reflect and replicate": (
        lambda x: F.pad(F.pad(x, (1, 1, 0, 0), mode="reflect"), (1, 0, 0, 2), mode="replicate"),
        8,
        8,
    ),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 2, 2),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 8, 32),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), 4, 8),
    "roll of the rows": (lambda x: x.roll(1, 2), 8, 8),
    "unfold by hand": (lambda x: torch.stack([x[..., :-1], x[..., 1:]], -1).sum(-1), 8, 8),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name: str) -> None:
    between, units, out = PIECES[name]
    x = torch.randn(2, 3, 4, 4).double()
    net = pn.PlasticNet(Between(between, out=out).double(), x)
    assert {n: len(s) for n, s in net.sites.items()} == {"a": units}
    assert_exact(net, (x,))


def noisy(x: Tensor) -> Tensor:
    out = torch.randn(x.shape, dtype=x.dtype)
    out[:, :4] = x[:, :4]
    return out


FROZEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "written into noise": (noisy, "combined with something"),
    "a fixed number of channels": (lambda x: x + torch.arange(8).view(1, 8, 1, 1), "that forward makes"),
    "strided": (lambda x: x.as_strided((len(x), 8, 4, 4), (128, 16, 1, 4)), "does not run when units are cut"),
    "pixel shuffle and back": (cut_up, "does not run when units are cut"),
    "padding over the channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), "padded over its channels"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen(name: str) -> None:
    between, reason = FROZEN[name]
    with pytest.raises(pn.PlasticError, match=f"nothing to gate.*a: .*{reason}"):
        pn.PlasticNet(Between(between).double(), torch.randn(2, 3, 4, 4).double())


class Einsum(nn.Module):
    """A weight that an equation reads, and one that gives birth to units."""

    def __init__(self, equation: str, *shape: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(5, 2)
        self.weight, self.equation = nn.Parameter(torch.randn(shape)), equation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.einsum(self.equation, self.a(x).tanh(), self.weight).tanh())


@pytest.mark.parametrize(
    ("equation", "shape"),
    [("bti,io->bto", (6, 5)), ("bti,oi->bto", (5, 6)), ("...i,io->...o", (6, 5))],
)
def test_einsum_with_a_weight(equation: str, shape: tuple[int, int]) -> None:
    x = torch.randn(4, 7, 3).double()
    net = pn.PlasticNet(Einsum(equation, *shape).double(), x)
    assert sorted(len(s) for s in net.sites.values()) == [5, 6]
    assert_exact(net, (x,))
    net.prune()
    assert sorted(net.model.weight.shape) == [1, 1]


class Packed(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(3, 6), kind(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.a(x), lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.b(out)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences(kind: type[nn.RNNBase]) -> None:
    x = (torch.randn(4, 7, 3).double(), torch.tensor([3, 7, 1, 5]))
    net = pn.PlasticNet(Packed(kind).double(), x)
    assert {n: len(s) for n, s in net.sites.items()} == {"a": 6, "rnn": 5}
    assert_exact(net, x)
    shorter = (x[0][:2, :4], torch.tensor([2, 4]))
    assert (net.compact()(*shorter) - net.eval()(*shorter)).abs().max() <= 1e-12


class Rotary(nn.Module):
    """Neighbouring features as the two parts of a complex number, turned by an angle of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.angle = nn.Linear(3, 8), nn.Linear(8, 2), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(self.a(x).unflatten(-1, (-1, 2)).contiguous())
        z = z * torch.polar(torch.ones_like(self.angle), self.angle)
        return self.b(torch.view_as_real(z).flatten(-2))


def test_complex_numbers() -> None:
    x = torch.randn(5, 3).double()
    net = pn.PlasticNet(Rotary().double(), x)
    assert {n: len(s) for n, s in net.sites.items()} == {"a": 4}
    assert_exact(net, (x,))
    net.prune()
    assert net.model.angle.shape == (1,)
    assert net.model.a.weight.shape == (2, 3)


class Branching(nn.Module):
    """A value decides which of two readouts runs."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(3, 6), nn.Linear(4, 2)
        self.one, self.two = nn.Linear(6, 4), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.c((self.one(h) if x.abs().sum().item() >= 0 else self.two(h)).tanh())


def test_a_layer_that_did_not_run_freezes_what_it_may_read() -> None:
    with pytest.raises(pn.PlasticError, match=r"nothing to gate.*a: the model reads a value and two did not run"):
        pn.PlasticNet(Branching(), torch.randn(5, 3))


def test_without_a_value_read_nothing_is_frozen_for_it() -> None:
    class Unused(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.one(self.a(x).tanh()).tanh())

    assert set(pn.PlasticNet(Unused(), torch.randn(5, 3)).sites) == {"a", "one"}
