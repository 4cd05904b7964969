"""The self-check: it sees what tracing cannot, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from plasticnet import PlasticError, PlasticNet
from plasticnet.checking.check import random_gates
from tests.kit.networks import images


class Chain(nn.Module):
    """Four layers; where asked, one of them reads its own width as a number."""

    def __init__(self, reads_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.reads_width = reads_width

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x).tanh()
            if i == self.reads_width:
                x = x * x.shape[-1]
        return x


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_bisection_freezes_the_culprit_alone(bad: int) -> None:
    net = PlasticNet(Chain(bad), (torch.randn(3, 6),))
    assert set(net.frozen) == {f"layers.{bad}", "layers.4"}
    assert set(net.sites) == {f"layers.{i}" for i in range(4) if i != bad}


def test_leaves_the_model_and_the_random_numbers_alone() -> None:
    model, x = Chain(2), torch.randn(3, 6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    PlasticNet(model, (x,))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_single_unit_that_cannot_grow_is_frozen() -> None:
    class Spanning(nn.Module):
        """Normalisation groups of 4 over a concatenation of 6 and 2: one spans the seam."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 2, 1)
            self.norm, self.out = nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(torch.cat([self.a(x), self.b(x)], 1)))

    net = PlasticNet(Spanning().double(), (images().double(),))
    assert {n: (len(s), s.units.growable) for n, s in net.sites.items()} == {"a": (1, True)}
    assert "neither cut nor added to" in net.frozen["a#2"]
    net.sites["a"].units.growable = False
    with pytest.raises(PlasticError, match="can lose units but not gain any"):
        net.grow({"a": 1})


def test_random_gates_leave_an_odd_number_open() -> None:
    for units in (1, 2, 7, 64):
        for share in (0.3, 0.8):
            for _ in range(20):
                assert int(random_gates(units, share).sum()) % 2 == 1


class Masked(nn.Module):
    """A part that changes nothing in shape, called with more than its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.layer(x if mask is None else x * mask).tanh()


@pytest.mark.parametrize("keyword", [False, True])
def test_a_single_block_is_checked(keyword: bool) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.head = nn.Linear(4, 6), Masked(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.one(x=x) if keyword else self.one(x, None))

    x = torch.randn(5, 4)
    net = PlasticNet(One(), x, blocks=("one",))
    if "depth" in net.sites:  # else it is frozen, which is right too
        with torch.no_grad():
            net.sites["depth"].phi.fill_(-1.0)
    torch.testing.assert_close(net.compact()(x), net.eval()(x))


def test_all_blocks_closed_is_checked() -> None:
    class Stacked(nn.Module):
        """Joins what its blocks return: without any there is nothing to join."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Masked() for _ in range(3))
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x, every = self.stem(x), []
            for layer in self.layers:
                x = layer(x)
                every.append(x)
            return self.head(torch.stack(every)[-1])

    x = torch.randn(5, 4)
    net = PlasticNet(Stacked(), x, blocks=("layers.?",))
    for name, site in net.sites.items():
        if name.endswith("depth"):
            with torch.no_grad():
                site.phi.fill_(-1.0)
    torch.testing.assert_close(net.compact()(x), net.eval()(x))


class Neighbours(nn.Module):
    """Layers of one width, which is read where another layer is meant, or which is divided with that of others."""

    def __init__(self, how: str, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.out, self.how = nn.Linear(6 * layers if "side" in how else 6, 3), how

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers[0], self.layers[1]
        match self.how:
            case "view":
                h = first(x).tanh()
                return self.out(second(h).view(-1, h.shape[1]))
            case "slice":
                h = first(x).tanh()
                return self.out(second(h)[:, : h.shape[1]])
            case "scale":
                h = first(x).tanh()
                return self.out(second(h) * h.shape[1])
            case _:
                h = torch.cat([layer(x) for layer in self.layers], 1)
                return self.out(h.unflatten(1, (2, h.shape[1] // 2)).tanh().flatten(1))


@pytest.mark.parametrize(
    ("how", "layers"), [("view", 2), ("slice", 2), ("scale", 2), ("side by side", 2), ("side by side", 3)]
)
def test_layers_that_agree_only_as_long_as_they_lose_alike(how: str, layers: int) -> None:
    try:
        net = PlasticNet(Neighbours(how, layers).double(), (x := torch.randn(4, 6).double(),)).eval()
    except PlasticError as error:
        assert "nothing to gate" in str(error)  # noqa: PT017
        return
    for kept in ([0], [0, 1], [0, 1, 2, 3]):
        twin = copy.deepcopy(net)
        twin.resize({next(iter(net.sites)): kept})
        before = copy.deepcopy(net)
        with torch.no_grad():
            before.sites[next(iter(net.sites))].phi.fill_(-1.0)[kept] = 1.0
        assert (twin(x) - before(x)).abs().max() <= 1e-12


class Distant(nn.Module):
    """Many layers of one width side by side, of which the first and another one must have equally many units."""

    def __init__(self, how: str, other: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.out, self.how, self.other = nn.Linear(4 * layers, 3), how, other

    def forward(self, x: Tensor) -> Tensor:
        found = [layer(x).tanh() for layer in self.layers]
        here, there = found[0], found[self.other]
        match self.how:
            case "expand":
                found[0] = here.mean(0, keepdim=True).expand_as(there)
            case "view":
                found[0] = here.view(there.shape)
            case "slice":
                found[0] = here[:, : there.shape[1]]
            case "slice of the later one":
                found[self.other] = there[:, : here.shape[1]]
            case _:
                found[0] = here * there.shape[1]
        return self.out(torch.cat(found, 1))


@pytest.mark.parametrize("how", ["expand", "view", "slice", "slice of the later one", "scale"])
@pytest.mark.parametrize("other", [3, 6, 9])  # of four units 3, 2 or 1 stay open, from layer to layer
@pytest.mark.parametrize("inputs", [(), ("out",)])  # a closed input of the last layer takes away the unit that it read
def test_layers_that_agree_by_their_place(how: str, other: int, inputs: tuple[str, ...]) -> None:
    net = PlasticNet(Distant(how, other, 10).double(), (x := torch.randn(5, 4).double(),), inputs=inputs).eval()
    assert len(net.sites) >= 8
    for site in net.sites:
        twin, before = copy.deepcopy(net), copy.deepcopy(net)
        twin.resize({site: [0, 2]})
        with torch.no_grad():
            before.sites[site].phi.fill_(-1.0)[[0, 2]] = 1.0
        torch.testing.assert_close(twin(x), before(x), rtol=1e-9, atol=1e-12)
