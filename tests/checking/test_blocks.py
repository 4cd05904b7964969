"""Blocks as units: closed ones are skipped, cut, priced and saved; what is no block is refused."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.layers.skip import Skip
from plasticnet.units import BlockUnits
from tests.kit.blocks import Block, InOrder, N
from tests.kit.networks import assert_same, set_probabilities


class Listed(InOrder):
    """Blocks in a ModuleList that forward iterates over."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Named(nn.Module):
    """Blocks that are plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.one, self.two, self.three = (Block() for _ in range(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(self.stem(x)))))


CASES: dict[str, tuple[type[nn.Module], tuple[str, ...], str]] = {  # model, patterns, name of the site
    "Sequential": (InOrder, ("layers.?",), "layers.depth"),
    "ModuleList": (Listed, ("layers.?",), "layers.depth"),
    "attributes": (Named, ("one", "two", "three"), "depth"),
}


def gated(name: str, **options: object) -> tuple[pn.PlasticNet, str]:
    make, patterns, site = CASES[name]
    net = pn.PlasticNet(make().double(), torch.randn(5, 4).double(), blocks=patterns, **options)  # pyright: ignore
    assert isinstance(net.sites[site].units, BlockUnits)
    assert len(net.sites[site]) == N
    return net, site


def set_open(net: pn.PlasticNet, site: str, pattern: tuple[bool, ...]) -> None:
    with torch.no_grad():
        net.sites[site].phi.copy_(torch.tensor(pattern).double() - 0.5)


def close_some_units(net: pn.PlasticNet) -> None:
    with torch.no_grad():
        for s in net.sites.values():
            if not isinstance(s.units, BlockUnits):
                s.phi[1::2] = -0.2


def by_hand(model: nn.Module, pattern: tuple[bool, ...], x: Tensor) -> Tensor:
    """The ungated model with some of its blocks left out."""
    blocks = list(model.layers) if hasattr(model, "layers") else [model.one, model.two, model.three]
    x = model.stem(x)
    for block, is_open in zip(blocks, pattern, strict=True):
        x = block(x) if is_open else x
    return model.head(x)


PATTERNS = list(itertools.product([True, False], repeat=N))


@pytest.mark.parametrize("k", [math.inf, 7.0])
@pytest.mark.parametrize("name", CASES)
def test_compact_equals_eval_at_every_pattern(name: str, k: float) -> None:
    net, site = gated(name)
    keys = set(net.model.state_dict())
    x = torch.randn(5, 4).double()
    net.eval()
    for pattern in PATTERNS:
        net.k = math.inf
        with torch.no_grad():
            for s in net.sites.values():
                s.phi.fill_(0.3)
        set_open(net, site, pattern)
        assert (net(x) - by_hand(net.model, pattern, x)).abs().max() <= 1e-12
        net.k = k
        assert net.sites[site].mean_gate(k).tolist() == list(pattern)  # 1, not its probability
        close_some_units(net)
        small, out = net.compact(), net(x)
        assert (small(x) - out).abs().max() <= 1e-9
        assert set(small.state_dict()) < keys if not all(pattern) else set(small.state_dict()) == keys
        for block, is_open in zip(net.sites[site].units.blocks, pattern, strict=True):
            assert any(key.startswith(f"{block}.") for key in small.state_dict()) == is_open
            place = dict(small.named_modules()).get(block)
            assert type(place) is (Block if is_open else Skip)
        assert set(net.model.state_dict()) == keys  # only the copy was cut


@pytest.mark.parametrize("name", CASES)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    for pattern in PATTERNS:
        net, site = gated(name)
        close_some_units(net)
        set_open(net, site, pattern)
        small, x = net.compact(), torch.randn(5, 4).double()
        pn.save(small, tmp_path / "a.safetensors")
        back = pn.load(tmp_path / "a.safetensors", lambda: CASES[name][0]().double())
        assert torch.equal(back(x), small(x))
        assert back.state_dict().keys() == small.state_dict().keys()
        pn.save(back, tmp_path / "b.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_load_into_another_architecture(tmp_path: Path) -> None:
    net, site = gated("Sequential")
    set_open(net, site, (True, False, True))
    pn.save(net.compact(), tmp_path / "a.safetensors")
    with pytest.raises(pn.PlasticError, match=r"has no 'layers\.1'"):
        pn.load(tmp_path / "a.safetensors", Named)


def test_compact_twice(tmp_path: Path) -> None:
    """A compact model can be gated again, and remembers what is gone."""
    net, site = gated("Sequential")
    close_some_units(net)
    set_open(net, site, (True, False, True))
    x = torch.randn(5, 4).double()
    again = pn.PlasticNet(net.compact(), x, blocks=("layers.?",))
    assert again.sites[site].units.blocks == ("layers.0", "layers.2")
    with torch.no_grad():
        again.sites[site].phi[0] = -1.0
    small = again.compact()
    assert [type(m) for m in small.layers] == [Skip, Skip, Block]
    pn.save(small, tmp_path / "a.safetensors")
    assert torch.equal(pn.load(tmp_path / "a.safetensors", lambda: InOrder().double())(x), small(x))


@pytest.mark.parametrize("name", CASES)
def test_a_closed_block_does_not_run(name: str) -> None:
    net, site = gated(name)
    set_open(net, site, (True, False, True))
    blocks = net.sites[site].units.blocks
    seen: list[int] = []
    for i, block in enumerate(blocks):
        net.model.get_submodule(block).up.register_forward_hook(lambda *_, i=i: seen.append(i))
    net.train()
    net.expected_loss(lambda: net(torch.randn(6, 4).double()).pow(2).sum(1)).backward()
    assert seen == [0, 2]
    for i, block in enumerate(blocks):
        for p in net.model.get_submodule(block).parameters():
            assert (p.grad is None) == (i == 1)


@pytest.mark.parametrize("name", CASES)
def test_the_summary_counts_what_compact_has(name: str) -> None:
    net, site = gated(name)
    close_some_units(net)
    for pattern in PATTERNS:
        set_open(net, site, pattern)
        summary, small = net.summary(), net.compact()
        assert summary.open_parameters == sum(p.numel() for p in small.parameters())
        macs = sum(m.weight.numel() for m in small.modules() if isinstance(m, nn.Linear))
        assert summary.open_macs == macs  # each weight is used once for one sample
    net.k = 2.0
    set_probabilities(net, site, 0.25, 0.5, 1.0 - 1e-9)
    pi = {n: s.probability(2.0).detach().double() for n, s in net.sites.items()}
    for cost in ("parameters", "macs"):
        expected = 0.0
        for pattern in PATTERNS:
            z = torch.tensor(pattern).double()
            p = torch.where(z > 0, pi[site], 1 - pi[site]).prod()
            expected += p * net.cost.expected(torch.cat(list({**pi, site: z}.values())), cost)
        assert float(net.penalty(1.0, cost).detach()) == pytest.approx(float(expected))  # pyright: ignore


# -- what is no block -------------------------------------------------------------------------


class Around(nn.Module):
    """One part that may be a block or not."""

    def __init__(self, part: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.stem, self.part, self.head = nn.Linear(4, 6), part, nn.Linear(width, 3)
        self.good, self.call = Block(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.part, self.good(self.stem(x)).tanh()))


class Pair(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # pyright: ignore
        return super().forward(x), 1


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (lambda: Around(nn.Linear(6, 8), lambda part, x: part(x), 8), r"output has shape \(5, 8\).*\(5, 6\)"),
    "tuple": (lambda: Around(Pair(), lambda part, x: part(x)[0]), "not a tuple"),
    "tuple in": (lambda: Around(nn.Identity(), lambda part, x: part((x,))[0]), "a tensor like its first input"),
    "twice": (lambda: Around(Block(), lambda part, x: part(part(x))), "called several times"),
    "never": (lambda: Around(Block(), lambda part, x: x), "never called"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    traced = pn.trace(make(), torch.randn(5, 4), blocks=("part", "good"))
    assert traced.sites["depth"].blocks == ("good",)  # pyright: ignore[reportAttributeAccessIssue]
    assert re.search(reason, traced.frozen["part (as a block)"])


def test_blocks_within_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Block(), Block()), nn.Linear(6, 3))
    traced = pn.trace(model, torch.randn(5, 4), blocks=("1", "1.?"))
    assert traced.sites["depth"].blocks == ("1",)  # pyright: ignore[reportAttributeAccessIssue]
    assert traced.frozen["1.0 (as a block)"] == traced.frozen["1.1 (as a block)"] == "a block within a block"


def test_patterns_that_match_nothing() -> None:
    for blocks in ("stage*", ("layers.?", "stage*")):
        with pytest.raises(pn.PlasticError, match=r"blocks='stage\*' matches no module.*layers"):
            pn.PlasticNet(InOrder(), torch.randn(5, 4), blocks=blocks)


def test_the_first_input_may_be_a_keyword() -> None:
    class Keyword(Listed):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x=x)
            return self.head(x)

    net = pn.PlasticNet(Keyword().double(), torch.randn(5, 4).double(), blocks=("layers.?",))
    set_open(net, "layers.depth", (False, True, False))
    x = torch.randn(5, 4).double()
    assert (net.eval()(x) - by_hand(net.model, (False, True, False), x)).abs().max() <= 1e-12
    assert (net.compact()(x) - net(x)).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "call",
    [
        lambda self, x: self.layers[2](self.layers[0](self.layers[1](x))),
        lambda self, x: sum(layer(x) * len(self.layers) for layer in self.layers),
    ],
    ids=["by number", "their number"],
)
def test_a_forward_may_count_its_blocks(call: Callable[[Listed, Tensor], Tensor]) -> None:
    class Counting(Listed):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(call(self, self.stem(x)))

    x = torch.randn(5, 4).double()
    net = pn.PlasticNet(Counting().double(), x, blocks=("layers.?",))
    for pattern in itertools.product((True, False), repeat=3):
        set_open(net, "layers.depth", pattern)
        assert (net.compact()(x) - net.eval()(x)).abs().max() <= 1e-12


def test_one_site_for_each_container() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Block(), Block()), nn.Sequential(Block()), nn.Linear(6, 3))
    net = pn.PlasticNet(model, torch.randn(5, 4), blocks=("1.*[01]", "2.0"))
    assert {n: len(s) for n, s in net.sites.items() if isinstance(s.units, BlockUnits)} == {"1.depth": 2, "2.depth": 1}


# -- sizes ------------------------------------------------------------------------------------


def test_blocks_cannot_be_resized() -> None:
    net, site = gated("Sequential")
    before = copy.deepcopy(net.state_dict())
    for sources in ([0, 1], [0, 1, 2, -1], [2, 1, 0]):
        with pytest.raises(pn.PlasticError, match=site):
            net.resize({site: sources})
    with pytest.raises(pn.PlasticError, match=site):
        net.grow({site: 1})
    assert_same(net.state_dict(), before)
    assert len(net.sites[site]) == N


def test_prune_leaves_blocks_and_checkpoints_keep_them(tmp_path: Path) -> None:
    net, site = gated("ModuleList")
    optimizer = torch.optim.Adam(net.param_groups(1e-2))
    net.k = 3.0
    x = torch.randn(5, 4).double()

    def step() -> None:
        net.train()
        optimizer.zero_grad()
        (net.expected_loss(lambda: net(x).pow(2).sum(1)) + net.penalty(0.1, "parameters")).backward()
        optimizer.step()

    step()
    close_some_units(net)
    set_open(net, site, (False, True, False))
    out = net.eval()(x)
    cut = net.prune(optimizer=optimizer)
    assert cut
    assert site not in cut
    assert net.sites[site].open.tolist() == [False, True, False]
    assert len(net.model.layers) == N
    assert (net.eval()(x) - out).abs().max() <= 1e-9
    step()
    pn.save_checkpoint(net.state_dict(), tmp_path / "a.safetensors")
    other, _ = gated("ModuleList")
    other.load_state_dict(pn.load_checkpoint(tmp_path / "a.safetensors"))
    assert_same(other.state_dict(), net.state_dict())
    assert torch.equal(other.eval()(x), net.eval()(x))
    state = net.state_dict()
    state[f"gates.site/{site.replace('.', '/')}.phi"] = torch.ones(2).double()
    state[f"gates.site/{site.replace('.', '/')}.grace"] = torch.ones(2).long()
    with pytest.raises(pn.PlasticError, match=site):
        other.load_state_dict(state)


def test_a_schedule_leaves_blocks_present() -> None:
    net, site = gated("Sequential")
    optimizer = torch.optim.Adam(net.param_groups(1e-2))
    stages = (pn.Stage(1, math.inf), pn.Stage(1, 7.0), pn.Stage(1, math.inf))
    schedule = pn.Schedule(net, optimizer, stages)
    for _ in range(3):
        if net.k == 7.0:
            set_open(net, site, (True, False, False))
        schedule.step(1.0)
    assert len(net.sites[site]) == N
    assert net.sites[site].open.tolist() == [True, False, False]


# -- the estimate -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["arms", "bitflip-cv", "disarm"])
def test_unbiased(estimator: str) -> None:
    draws = 1000
    net, site = gated("Sequential", estimator=estimator, exclude=("layers.?.up",))
    for s in net.sites.values():
        if s.name != site:
            s.grace.fill_(1)
    net.k = 2.0
    phi, x = net.sites[site].phi, torch.randn(5, 4).double()
    with torch.no_grad():
        phi.copy_(torch.tensor([-0.4, 0.1, 0.6]))
    logits = phi.detach().clone().requires_grad_()
    pi, total = torch.sigmoid(2.0 * logits), torch.zeros(())
    for pattern in PATTERNS:
        f = by_hand(net.model, pattern, x).pow(2).sum(1).mean().detach()
        total = total + torch.where(torch.tensor(pattern), pi, 1 - pi).prod() * f
    (exact,) = torch.autograd.grad(total, logits)
    net.train()
    estimates = []
    for _ in range(draws):
        loss = net.expected_loss(lambda: net(x).pow(2).sum(1))
        estimates.append(torch.autograd.grad(loss, phi)[0])
    stacked = torch.stack(estimates)
    error = stacked.std(0) / draws**0.5
    assert ((stacked.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all()
    assert (error < exact.abs().max()).all()


@pytest.mark.parametrize("place", range(3))
def test_what_lies_in_a_block_is_compared_with_the_block_open(place: int) -> None:
    """A layer that uses its width is frozen, in whichever block it lies."""

    class Scaled(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x).tanh()
            return x + self.down(y / y.shape[-1])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Scaled() if i == place else Block() for i in range(3)])
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    net = pn.PlasticNet(Model(), (torch.randn(4, 6),), blocks=("layers.?",))
    assert f"layers.{place}.up" not in net.sites
    assert f"layers.{place}.up" in net.frozen
    assert len(net.sites) == 3  # the other two hidden layers, and the blocks
