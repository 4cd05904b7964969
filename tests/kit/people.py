"""Models as people have them: adapters, parametrizations, frozen parts, recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchvision.ops import FrozenBatchNorm2d

from tests.kit.adversarial import Case

CASES: dict[str, Case] = {}


def case(inputs: Callable[[], tuple[Tensor, ...]], **expected: Any) -> Callable[[Callable[[], nn.Module]], Any]:
    """Register a factory; its docstring is the reason."""

    def register(factory: Any) -> Any:
        CASES[factory.__name__] = Case(factory.__name__, factory.__doc__ or "", factory, inputs, **expected)
        return factory

    return register


def vectors() -> tuple[Tensor, ...]:
    return (torch.randn(3, 4),)


def images() -> tuple[Tensor, ...]:
    return (torch.randn(4, 3, 4, 4),)


def steps() -> tuple[Tensor, ...]:
    return (torch.randn(3, 5, 4),)


class Named(nn.Module):
    """Layers a, b, c with tanh between them."""

    def __init__(self, a: nn.Module, b: nn.Module, c: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = a, b, c

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


@case(vectors, exact={"a": 6, "b": 5}, frozen={"c": "output"})
def frozen_backbone() -> nn.Module:
    """Exact: parameters that do not train are cut like others, and stay as they are."""
    model = Named(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    model.a.requires_grad_(False)
    model.b.requires_grad_(False)
    return model


class Lora(nn.Module):
    """A frozen layer and a low-rank update that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


@case(vectors, exact={"a.base": 6, "a.down": 2, "b.base": 5, "b.down": 3}, frozen={"c": "output"})
def lora() -> nn.Module:
    """Exact: the update's rows go with the layer's, and its rank is a width of its own."""
    return Named(Lora(nn.Linear(4, 6), 2), Lora(nn.Linear(6, 5), 3), nn.Linear(5, 2))


@case(vectors, exact={"a": 6, "b": 5}, frozen={"c": "output"})
def weight_norm() -> nn.Module:
    """Exact: a row of the weight and its length go together."""
    return Named(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 5), nn.Linear(5, 2))


@case(vectors, exact={"a.0": 6, "a.1": 3, "b": 5}, frozen={"c": "output"})
def weight_norm_reads() -> nn.Module:
    """Exact: the length of the computed weight is over what it reads, and follows every cut."""
    a = nn.Sequential(nn.Linear(4, 6), parametrizations.weight_norm(nn.Linear(6, 3)))
    return Named(a, nn.Linear(3, 5), nn.Linear(5, 2))


@case(vectors, exact={"b": 5}, frozen={"c": "output"})
def spectral_norm() -> nn.Module:
    """Frozen: the largest singular value depends on every row and column. Exact elsewhere."""
    return Named(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Linear(6, 5), nn.Linear(5, 2))


@case(vectors, exact={"a": 6, "b": 5}, frozen={"c": "output"})
def old_weight_norm() -> nn.Module:
    """Exact, as with the parametrization."""
    return Named(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 5), nn.Linear(5, 2))


@case(images, exact={"0": 6, "3": 5}, frozen={"5": "output"})
def frozen_batch_norm() -> nn.Module:
    """Exact: all its vectors are buffers, which are cut with the channels."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        FrozenBatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1),
        nn.Tanh(),
        nn.Conv2d(5, 2, 1),
    )


@case(
    vectors,
    exact={"0": 5, "6": 6},
    frozen={"8": "output"},
)
def shared_layers() -> nn.Module:
    """Exact: one module in two places reads what it produces."""
    shared = nn.Linear(5, 5)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)
    )


@case(vectors, exact={"a": 5}, frozen={"c": "output"})
def tied_weights() -> nn.Module:
    """Exact: two modules hold one parameter, so both lose the same units."""
    model = nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(5, 5), "d": nn.Linear(5, 5), "c": nn.Linear(5, 2)})
    model["d"].weight = model["b"].weight

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.d, self.c = model["a"], model["b"], model["d"], model["c"]

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.d(self.b(self.a(x).tanh()).tanh()).tanh())

    return Tied()


# -- recurrent layers: exact or frozen with the reason ------------------------------------------


class Recurrent(nn.Module):
    """Linear, recurrent layer, hidden layer, output; batch first."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool = False, last: bool = False, **options: Any) -> None:
        super().__init__()
        self.a, self.rnn = nn.Linear(4, 6), kind(6, 5, **options)
        width = (options.get("proj_size") or 5) * (2 if options.get("bidirectional") else 1)
        self.b, self.c = nn.Linear(width, 7), nn.Linear(7, 2)
        self.packed, self.last = packed, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        if self.packed:
            x = pack_padded_sequence(x, torch.tensor([5, 3, 2]), self.rnn.batch_first)
        h, state = self.rnn(x)
        if self.last:
            state = state[0] if isinstance(state, tuple) else state
            return self.c(self.b(state[-1]).tanh())
        if self.packed:
            h, _ = pad_packed_sequence(h, self.rnn.batch_first)
        h = self.b(h).tanh()
        return self.c(h if self.rnn.batch_first else h.transpose(0, 1))


class Cells(nn.Module):
    """A loop over the cell of an LSTM or GRU."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.a, self.cell, self.b, self.c = nn.Linear(4, 6), kind(6, 5), nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.a(x).tanh().unbind(1):
            state = self.cell(step, state)
        h = state[0] if isinstance(state, tuple) else state
        return self.c(self.b(h).tanh())


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM, batch_first=True),
    "gru": lambda: Recurrent(nn.GRU, batch_first=True),
    "rnn": lambda: Recurrent(nn.RNN, batch_first=True),
    "lstm, time first": lambda: Recurrent(nn.LSTM),
    "gru, last state": lambda: Recurrent(nn.GRU, last=True),
    "lstm, last state": lambda: Recurrent(nn.LSTM, last=True, batch_first=True),
    "lstm, two layers": lambda: Recurrent(nn.LSTM, num_layers=2, batch_first=True),
    "gru, two layers, bidirectional": lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
    "lstm, bidirectional": lambda: Recurrent(nn.LSTM, bidirectional=True),
    "lstm, projected": lambda: Recurrent(nn.LSTM, proj_size=3, batch_first=True),
    "lstm, no bias": lambda: Recurrent(nn.LSTM, bias=False, batch_first=True),
    "lstm, packed": lambda: Recurrent(nn.LSTM, packed=True, batch_first=True),
    "gru, packed, time first": lambda: Recurrent(nn.GRU, packed=True),
    "rnn, relu": lambda: Recurrent(nn.RNN, nonlinearity="relu", batch_first=True),
    "lstm cell": lambda: Cells(nn.LSTMCell),
    "gru cell": lambda: Cells(nn.GRUCell),
    "rnn cell": lambda: Cells(nn.RNNCell),
}
