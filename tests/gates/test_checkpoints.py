"""Gradient checkpointing: what runs again in the backward pass sees the gates of its own pass."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from plasticnet import PlasticError, PlasticNet
from tests.kit.interrupts import interrupted, lines_of
from tests.kit.networks import images, randomise_gates

X, Y = torch.randn(10, 4), torch.arange(10) % 3


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.up(self.norm(x)).tanh()))


class Net(nn.Module):
    """A layer, one in the middle, two blocks and a head; ``how`` says what is checkpointed."""

    def __init__(self, middle: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.how = ""
        self.first, self.middle = nn.Linear(4, 6), middle or nn.Identity()
        self.blocks, self.head = nn.ModuleList([Block(dropout), Block(dropout)]), nn.Linear(6, 3)

    def _begin(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if isinstance(self.middle, nn.LSTM):
            return self.middle(x[:, None].expand(-1, 3, -1).contiguous())[0][:, -1]
        return self.middle(x)

    def forward(self, x: Tensor) -> Tensor:
        def run(function: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(function, *args, use_reentrant=False) if self.how else function(*args)

        def both(x: Tensor) -> Tensor:
            for block in self.blocks:
                x = run(block, x)
            return x

        x = run(self._begin, x)
        return self.head(run(both, x) if self.how == "nested" else both(x))


KINDS: dict[str, dict[str, Any]] = {
    "per sample": {},
    "per batch": {"gates": "batch"},
    "masked norms": {"residual": True},
    "blocks": {"blocks": ("blocks.?",)},
    "single weights": {"weights": ("*.down", "head")},
    "input features": {"inputs": ("blocks.0.down",)},
}
MODELS: dict[str, Callable[[], Net]] = {
    "plain": Net,
    "dropout": lambda: Net(dropout=0.3),
    "batch norm": lambda: Net(nn.BatchNorm1d(6)),
    "recurrent": lambda: Net(nn.LSTM(6, 6, batch_first=True)),
}


def gradients(net: PlasticNet, closure: Callable[[], Tensor], free: bool = False) -> list[Tensor]:
    net.zero_grad()
    net.sampler.samples_apart = net.sampler.rows_apart = None
    torch.manual_seed(5)
    loss = closure().mean() if free else net.expected_loss(closure)
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None), torch.get_rng_state()]


def compare(net: PlasticNet, model: Net, free: bool = False) -> None:
    """Compare each way of checkpointing with none, to the bit."""
    found = {}
    for how, around in (("", False), ("parts", False), ("nested", False), ("", True), ("parts", True)):
        model.how = how

        def closure(around: bool = around) -> Tensor:
            out = checkpoint(net, X, use_reentrant=False) if around else net(X)
            return F.cross_entropy(out, Y, reduction="none")  # pyright: ignore[reportArgumentType]

        found[how, around] = gradients(net, closure, free)
    expected = found.pop(("", False))
    assert len(expected) > 5
    for way, others in found.items():
        assert len(others) == len(expected), way
        assert all(torch.equal(one, other) for one, other in zip(expected, others, strict=True)), way


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_checkpoints(kind: str, make: str) -> None:
    model = MODELS[make]()
    net = PlasticNet(model, (X,), **KINDS[kind])
    randomise_gates(net)
    for k in (2.0, math.inf, 0.0):
        net.k = k
        compare(net.train(), model)
    net.k = 2.0
    compare(net, model, free=True)


@pytest.mark.parametrize("estimator", ["disarm", "disarm-cv", "disarm-mean", "ar", "arms", "straight-through"])
def test_every_kind_of_pass(estimator: str) -> None:
    model = MODELS["dropout"]()
    net = PlasticNet(model, (X,), estimator=estimator)
    randomise_gates(net)
    net.k = 2.0
    compare(net.train(), model)


def test_features_that_are_selected_before_a_layer() -> None:
    """All gates are open, but an input site has lost features: what runs again must leave them out, too."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.on = False
            self.conv, self.fc, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 8), nn.Linear(8, 3)

        def rest(self, x: Tensor) -> Tensor:
            return self.out(self.fc(x).tanh())

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).tanh().flatten(1)
            return checkpoint(self.rest, x, use_reentrant=False) if self.on else self.rest(x)  # pyright: ignore[reportReturnType]

    model, x = Flat(), images(6)
    net = PlasticNet(model, (x,), inputs=("fc",)).train()
    net.resize({"fc.input": [0, 3, *range(7, 40)]})
    found = []
    for model.on in (False, True):
        found.append(gradients(net, lambda: net(x).square().sum(1)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_model_that_takes_a_gradient_within() -> None:
    """Its own backward pass runs parts again while the gates are still in place."""

    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.on = False
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            parts = (lambda t: self.a(t).tanh(), lambda t: self.b(t).tanh())
            h = x
            for part in parts:
                h = checkpoint(part, h, use_reentrant=False) if self.on else part(h)
            energy = self.c(h)
            return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    for gates in ("sample", "batch"):
        model = Potential()
        net = PlasticNet(model, (X,), gates=gates)  # pyright: ignore[reportArgumentType]
        randomise_gates(net)
        net.k = 2.0
        net.train()

        def closure(net: PlasticNet = net) -> Tensor:
            energy, forces = net(X)
            return energy.square()[:, 0] + forces.square().sum(1)

        net.expected_loss(closure)  # finds out that it needs gradients
        found = []
        for model.on in (False, True):
            found.append(gradients(net, closure))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def test_in_sequence() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.on = False
            self.body = nn.Sequential(
                nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)
            )

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.body, 3, x, use_reentrant=False) if self.on else self.body(x)

    model = Sequence()
    net = PlasticNet(model, (X,))
    randomise_gates(net)
    net.k = 2.0
    net.train()
    found = []
    for model.on in (False, True):
        found.append(gradients(net, lambda: net(X).square().sum(1)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_after_other_passes_and_another_k() -> None:
    """The backward pass may come late: the gates are those of its own pass all the same."""
    model = MODELS["dropout"]()
    net = PlasticNet(model, (X,))
    randomise_gates(net)
    net.train()
    found = []
    for model.how in ("", "parts"):
        net.k = 2.0
        net.zero_grad()
        torch.manual_seed(1)
        loss = net.expected_loss(lambda: net(X).square().sum(1))
        net.k = 5.0
        net(X)
        with torch.no_grad():
            net(X[:3])
        loss.backward()
        found.append([p.grad for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Old(nn.Module):
    """A checkpoint as it was by default for long."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(lambda t: self.b(t).relu(), self.a(x).relu(), use_reentrant=True)
        return self.c(y)  # pyright: ignore[reportArgumentType]


def test_reentrant_checkpoints_are_refused_where_they_would_be_wrong() -> None:
    net, x = PlasticNet(Old(), torch.randn(4, 8)).train(), torch.randn(4, 8)
    net(x).sum().backward()  # everything is open
    net.sites["a"].phi.data[0] = -1.0
    with pytest.raises(PlasticError, match=r"gradient checkpointing.*use_reentrant=False"):
        net(x)
    net.k = 2.0
    with pytest.raises(PlasticError, match=r"gradient checkpointing.*use_reentrant=False"):
        net.expected_loss(lambda: net(x).sum(1))
    with torch.no_grad():
        net(x)
    assert checkpoint(torch.sin, torch.ones(2, requires_grad=True), use_reentrant=True).sum() > 0  # pyright: ignore


def test_an_interrupted_run_lets_no_later_one_go_unnoticed() -> None:
    """Wherever a run is interrupted, reentrant checkpoints are refused under gates, and run outside of them."""
    x = torch.randn(4, 8)
    plain = PlasticNet(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), x)
    net = PlasticNet(Old(), x).train()
    plain.sites["0"].phi.data[0] = net.sites["a"].phi.data[0] = -1.0
    plain(x)
    gc.freeze()  # each refusal looks for garbage, which takes seconds among what other tests have left
    try:
        for at in range(lines_of(lambda: plain(x))):
            with suppress(KeyboardInterrupt), interrupted(at):
                plain(x)
            with pytest.raises(PlasticError, match="gradient checkpointing"):
                net(x)
            assert checkpoint(torch.sin, torch.ones(2, requires_grad=True), use_reentrant=True).sum() > 0  # pyright: ignore
    finally:
        gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gates": "batch"}, {"residual": True}])
def test_transformers(options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(50, (3, 7))
    net = PlasticNet(model, {"input_ids": ids}, **options)
    randomise_gates(net)
    net.k = 2.0
    net.train()

    def closure() -> Tensor:
        return net(input_ids=ids).logits.square().flatten(1).mean(1)

    expected = gradients(net, closure)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(net, closure)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(PlasticError, match="use_reentrant=False"):
        gradients(net, closure)
