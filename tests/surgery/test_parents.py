"""State dicts of another size load through any module that contains the network, or are refused without a change."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from plasticnet import PlasticError, PlasticNet
from tests.kit.networks import assert_same

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer(self.norms[0](x)).relu()
        return self.out(self.norms[1](x))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.c(self.b(self.a(x)).relu()).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x[:, None].expand(-1, 3, -1))[0][:, -1])


def chain() -> nn.Module:
    layers = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)
    return nn.Sequential(*layers)


def blocks() -> nn.Module:
    block = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8))
    return nn.Sequential(nn.Linear(8, 8), block, nn.Linear(8, 3))


def computed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), parametrizations.weight_norm(nn.Linear(12, 6)), nn.ReLU(), nn.Linear(6, 3)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "chain": (chain, {}),
    "inputs": (chain, {"inputs": "3"}),
    "weights": (chain, {"weights": "*"}),
    "norms": (Stream, {"residual": True}),
    "tied": (Tied, {}),
    "recurrent": (Recurrent, {}),
    "computed": (computed, {}),
    "blocks": (blocks, {"blocks": "1"}),
}


class Task(nn.Module):
    """What people train: a network among other modules."""

    def __init__(self, net: PlasticNet) -> None:
        super().__init__()
        self.head, self.net = nn.Linear(3, 2), net


PARENTS: dict[str, Callable[[PlasticNet], nn.Module]] = {
    "itself": lambda net: net,
    "a task": Task,
    "a list": lambda net: nn.ModuleList([nn.Linear(2, 2), net]),
    "two levels": lambda net: nn.ModuleDict({"tasks": nn.ModuleList([Task(net)]), "other": nn.Linear(2, 2)}),
    "compiled": lambda net: torch.compile(net, backend="eager"),  # pyright: ignore[reportReturnType]
}


def build(name: str) -> PlasticNet:
    make, options = NETWORKS[name]
    return PlasticNet(make(), (X,), **options).eval()


def cut(net: PlasticNet) -> PlasticNet:
    """The network at another k and of another size, with some gates closed."""
    torch.manual_seed(1)
    net.k = 7.0
    for below in (0.4, 0.0):
        with torch.no_grad():
            for g in net.all_gates():
                g.phi.copy_(torch.randn_like(g.phi) * 0.4)
        net.prune(below)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_another_size_loads_through_any_parent(name: str, parent: str) -> None:
    wrap = PARENTS[parent]
    for assign in (False, True):
        for smaller in (True, False):
            source, target = cut(build(name)), build(name)
            source, target = (source, target) if smaller else (target, source)
            parameters, optimizer = list(target.parameters()), torch.optim.Adam(target.param_groups(1e-2))
            state = copy.deepcopy(wrap(source).state_dict())
            wrap(target).load_state_dict(state, assign=assign)
            assert target.k == source.k
            assert torch.equal(target(X), source(X))
            assert torch.equal(target.compact()(X), source.compact()(X))
            assert [len(s) for s in target.sites.values()] == [len(s) for s in source.sites.values()]
            same = all(p is q for p, q in zip(parameters, target.parameters(), strict=False))
            assert same is not assign
            target.train().expected_loss(lambda net=target: net(X).square().sum(1)).backward()
            if not assign:
                optimizer.step()


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "computed"])
def test_copies_and_pickles_load_too(name: str) -> None:
    net, other = build(name), cut(build(name))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        Task(twin).load_state_dict({**Task(net).state_dict(), **Task(other).state_dict()})
        assert torch.equal(twin(X), other(X))
        assert [len(s) for s in net.sites.values()] != [len(s) for s in twin.sites.values()]


def test_two_networks_in_one_parent() -> None:
    source = nn.ModuleDict({"a": cut(build("chain")), "b": cut(build("inputs"))})
    target = nn.ModuleDict({"a": build("chain"), "b": build("inputs")})
    target.load_state_dict(source.state_dict())
    for name, net in target.items():
        assert torch.equal(net(X), source[name](X))


def test_what_is_not_of_the_network_need_not_be_there() -> None:
    task, source = Task(build("chain")), Task(cut(build("chain")))
    before = copy.deepcopy(task.net.state_dict())
    task.load_state_dict({"head.weight": torch.ones(2, 3)}, strict=False)  # nothing of the network
    assert_same(task.net.state_dict(), before)
    assert torch.equal(task.head.weight, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.model"):
        task.load_state_dict({"head.weight": torch.ones(2, 3)})
    assert_same(task.net.state_dict(), before)
    state = {n: t for n, t in source.state_dict().items() if n != "head.bias"}
    found = task.load_state_dict({**state, "more": torch.ones(1)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["head.bias"], ["more"])
    assert torch.equal(task.net(X), source.net(X))


WRONG: dict[str, tuple[str, Callable[[Tensor], Any]]] = {  # the end of a name, and what the state has there
    "none": ("model.5.bias", lambda t: None),
    "text": ("model.5.bias", lambda t: "x"),
    "a list": ("model.5.bias", lambda t: t.tolist()),
    "complex": ("model.5.bias", lambda t: t * (1 + 1j)),
    "whole numbers": ("model.5.bias", lambda t: t.long()),
    "NaN": ("model.5.bias", lambda t: t * math.nan),
    "infinite": ("model.0.weight", lambda t: t + math.inf),
    "sparse": ("model.5.weight", lambda t: t.to_sparse()),
    "without values": ("model.5.weight", lambda t: t.to("meta")),
    "another shape": ("model.5.bias", lambda t: torch.zeros(4)),
    "a count with a fraction": ("model.1.num_batches_tracked", lambda t: t + 0.5),
    "logits that are NaN": ("gates.site/0.phi", lambda t: t * math.nan),
    "logits that are infinite": ("gates.site/0.phi", lambda t: t + math.inf),
    "whole logits": ("gates.site/0.phi", lambda t: t.long()),
    "grace with a fraction": ("gates.site/0.grace", lambda t: t + 0.5),
    "complex k": ("_extra_state", lambda t: t * 1j),
    "k without a value": ("_extra_state", lambda t: t.to("meta")),
}


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_changes_nothing(name: str, prefix: str) -> None:
    net, source = build("chain"), cut(build("chain"))
    key, wrong = WRONG[name]
    state = {f"{prefix}{n}": t for n, t in source.state_dict().items()}
    state[prefix + key] = wrong(source.state_dict()[key])
    before, parameters, widths = copy.deepcopy(net.state_dict()), list(net.parameters()), repr(net.model)
    with pytest.raises(PlasticError, match=r"k[=)]" if key == "_extra_state" else key.removeprefix("model.")):
        (Task(net) if prefix else net).load_state_dict(state, strict=not prefix)
    assert_same(net.state_dict(), before)
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert repr(net.model) == widths


def test_weights_that_are_infinite_here_may_be_so_in_the_state() -> None:
    def make() -> PlasticNet:
        model = chain()
        model.mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
        return PlasticNet(model, (X,))

    net = make()
    net.load_state_dict(cut(make()).state_dict())
    assert net.model.mask[1] == -math.inf


def test_names_of_one_tensor_must_agree() -> None:
    net, state = build("tied"), copy.deepcopy(dict(build("tied").state_dict()))
    for other in (state["model.c.weight"] + 1, torch.zeros(6, 7)):
        with pytest.raises(PlasticError, match=r"model\.c\.weight"):
            net.load_state_dict({**state, "model.c.weight": other})
    net.load_state_dict(state)


def test_keys_that_are_no_names() -> None:
    net = build("chain")
    with pytest.raises(PlasticError, match="no names"):
        net.load_state_dict({**net.state_dict(), 3: torch.ones(1)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlasticError, match="lacks"):
        net.load_state_dict({})


@pytest.mark.parametrize("parent", ["itself", "a task"])
def test_gates_stay_precise_when_the_tensors_of_a_state_are_taken(parent: str) -> None:
    source, target = cut(build("chain")), build("chain")
    whole = PARENTS[parent](source).state_dict()
    half = {n: t.bfloat16() if t.is_floating_point() and t.dim() else t for n, t in whole.items()}
    PARENTS[parent](target).load_state_dict(half, assign=True)
    assert {p.dtype for p in target.model.parameters()} == {torch.bfloat16}
    assert {g.phi.dtype for g in target.all_gates()} == {torch.float32}
    x = X.bfloat16()
    torch.testing.assert_close(target.compact()(x), target(x), rtol=0.05, atol=0.05)
