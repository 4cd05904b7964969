"""Models are copied in whatever state they are: with results of a run, locks, files and the like in them."""

from __future__ import annotations

import collections
import copy
import dataclasses
import io
import queue
import socket
import tempfile
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import plasticnet as pn
from plasticnet.tools.copying import deep_copy


class Keeping(nn.Module):
    """A model that keeps something of its last run."""

    def __init__(self, keep: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.keep, self.kept = [keep], None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.kept = self.keep[0](self, h)
        return self.b(h)


@dataclasses.dataclass
class Data:
    maps: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    maps: Any


class Helper:
    """An object that knows its model."""

    def __init__(self, model: nn.Module, maps: Any) -> None:
        self.model, self.maps = model, maps


class Refusing:
    """An object that cannot be copied."""

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError("this is not to be copied")


class Owner:
    """An object that closes its file when it is deleted."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def __del__(self) -> None:
        self.file.close()


def circle(h: Tensor) -> list[Any]:
    found: list[Any] = [h]
    found.append(found)
    return found


def by_module(model: Any, h: Tensor) -> Any:
    found = weakref.WeakKeyDictionary[nn.Module, Tensor]()
    found[model.a] = h
    return found


RESULTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "attribute": lambda m, h: h,
    "list": lambda m, h: [h],
    "tuple": lambda m, h: (h, 1),
    "dict": lambda m, h: {"maps": h},
    "nested": lambda m, h: {"maps": [(h, {"x": h})]},
    "a list in itself": lambda m, h: circle(h),
    "deque": lambda m, h: collections.deque([h], maxlen=3),
    "defaultdict": lambda m, h: collections.defaultdict(list, maps=[h]),
    "named tuple": lambda m, h: collections.namedtuple("Pair", "x y")(h, 1),
    "dataclass": lambda m, h: Data([h]),
    "slots": lambda m, h: Slots([h]),
    "namespace": lambda m, h: types.SimpleNamespace(maps=h),
    "object": Helper,
    "by module": by_module,
    "a view of a weight": lambda m, h: [m.a.weight[:3]],
}
SHARED: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "lock that may be taken twice": threading.RLock,
    "file": lambda: io.FileIO(0, closefd=False),
    "generator": lambda: (i for i in range(3)),
    "socket": socket.socket,
    "thread": threading.Thread,
    "pool": lambda: ThreadPoolExecutor(1),
    "module": lambda: types,
    "local": threading.local,
    "queue": queue.SimpleQueue,
    "object": Refusing,
    "owner": Owner,
}


def trained(net: pn.PlasticNet, x: Tensor) -> None:
    optimizer = torch.optim.SGD(net.param_groups(lr=0.1))
    schedule = pn.Schedule(net, optimizer, [pn.Stage(1), pn.Stage(1, k=7.0), pn.Stage(1)], budget=pn.Budget(params=0.5))
    for _ in range(schedule.epochs):
        net.train()
        loss = net.expected_loss(lambda: net(x).square().sum(1)) + schedule.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def tensors_in(found: Any) -> Iterator[Tensor]:
    """All tensors that a value keeps, but not those of a model."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, collections.abc.Mapping):
        yield from (t for v in found.values() for t in tensors_in(v))
    elif isinstance(found, list | tuple | collections.deque):
        yield from (t for v in found if v is not found for t in tensors_in(v))
    elif hasattr(found, "maps"):
        yield from tensors_in(found.maps)


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_a_run_are_copied_by_value(name: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Keeping(RESULTS[name])

    x, model = torch.randn(5, 6), make()
    model(x)
    net = pn.PlasticNet(model, (x,))
    assert list(net.sites) == ["a"]
    trained(net, x)
    net.train()(x)
    kept = list(tensors_in(model.kept))
    values = [t.detach().clone() for t in kept]
    assert any(t.grad_fn is not None for t in kept)
    small = net.compact()
    copies = list(tensors_in(small.kept))
    assert len(copies) == len(kept)
    assert all(t.grad_fn is None and t.data_ptr() != u.data_ptr() for t, u in zip(copies, kept, strict=True))
    pn.save(small, tmp_path / "small")
    torch.testing.assert_close(small(x), net.eval()(x))
    torch.testing.assert_close(pn.load(tmp_path / "small", make)(x), net(x))
    assert all(torch.equal(t, v) for t, v in zip(kept, values, strict=True))


@pytest.mark.parametrize("name", SHARED)
def test_what_cannot_be_copied_is_shared(name: str) -> None:
    thing, x = SHARED[name](), torch.randn(5, 6)
    model = Keeping(lambda m, h: (thing, [h]))
    model.thing = {"thing": [thing]}  # pyright: ignore[reportAttributeAccessIssue]
    model(x)
    net = pn.PlasticNet(model, (x,))
    trained(net, x)
    small: Any = net.compact()
    assert small.thing["thing"][0] is thing
    assert small.thing is not model.thing
    torch.testing.assert_close(small(x), net.eval()(x))
    del small
    if name in ("file", "socket"):
        assert thing.fileno() >= 0  # it is open
    if isinstance(thing, Owner):
        assert not thing.file.closed


def test_a_helper_of_the_copy_knows_the_copy() -> None:
    model = Keeping(Helper)
    model(torch.randn(5, 6))
    net = pn.PlasticNet(model, (torch.randn(5, 6),))
    small: Any = net.compact()
    assert small.kept.model is small
    assert model.kept is not None
    assert model.kept.model is model


class Stateless(Keeping):
    def __getstate__(self) -> Any:
        raise TypeError("this has no state")


class Uncopied(Keeping):
    def __deepcopy__(self, _: Any) -> Any:
        raise TypeError("this is not to be copied")


def normed(keep: Callable[[Any, Tensor], Any]) -> nn.Module:
    model = Keeping(keep)
    parametrizations.weight_norm(model.a)
    model.a.parents = [model]  # pyright: ignore[reportAttributeAccessIssue]
    model.a.maps = [torch.ones(2, requires_grad=True) * 2]  # pyright: ignore[reportAttributeAccessIssue]
    return model


def traced(_: Any) -> nn.Module:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    model.maps, model.mutex = [torch.ones(2, requires_grad=True) * 2], threading.Lock()
    return model


@pytest.mark.parametrize("make", [Stateless, Uncopied, normed, traced])
def test_modules_that_refuse_to_be_copied(make: Callable[..., nn.Module]) -> None:
    model, x = make(lambda m, h: [h]), torch.randn(5, 6)
    model(x)
    net = pn.PlasticNet(model, (x,))
    small = net.compact()
    torch.testing.assert_close(small(x), net.eval()(x))
    assert not {id(p) for p in small.parameters()} & {id(p) for p in model.parameters()}


def test_gradients_and_buffers_with_a_graph() -> None:
    model, x = Keeping(lambda m, h: h), torch.randn(5, 6)
    leaf = torch.ones(3, requires_grad=True)
    leaf.grad = leaf * 2  # as after backward(create_graph=True)
    model.leaf = leaf
    model.register_buffer("computed", torch.ones(3, requires_grad=True) * 2, persistent=False)
    net = pn.PlasticNet(model, (x,))
    torch.testing.assert_close(net.compact()(x), net.eval()(x))


def test_what_a_transformation_has_left_behind() -> None:
    model, x, left = Keeping(lambda m, h: h), torch.randn(5, 6), []
    torch.vmap(lambda t: left.append(t * 2) or t)(torch.ones(3))
    model.left = left
    net = pn.PlasticNet(model, (x,))
    torch.testing.assert_close(net.compact()(x), net.eval()(x))


def test_a_network_of_a_traced_model_is_copied_as_a_network() -> None:
    net = pn.PlasticNet(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))), (torch.randn(5, 6),))
    assert isinstance(copy.deepcopy(net), pn.PlasticNet)


def test_blocks_with_inputs_that_have_a_graph() -> None:
    x = torch.randn(5, 6, requires_grad=True) * 2
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3))
    assert "depth" in pn.PlasticNet(model, (x,), blocks="1").sites


# -- functions that have hold of the model ----------------------------------------------------


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def hook_on_the_root(model: Three) -> None:
    model.c.register_forward_hook(lambda module, args, out: out * model.c.bias.mean())


def hook_on_a_sibling(model: Three) -> None:
    other = model.c
    model.b.register_forward_pre_hook(lambda module, args: (args[0] + other.bias.sum(),))


def another_forward(model: Three) -> None:
    before = model.forward
    model.forward = lambda x: before(x) * 2  # type: ignore[method-assign]


def a_default(model: Three) -> None:
    def hook(module: nn.Module, args: Any, out: Tensor, *, root: Three = model) -> Tensor:
        return out + root.c.bias.sum()

    model.a.register_forward_hook(hook)


def in_a_list(model: Three) -> None:
    layers = [model.c, model.c]
    model.a.register_forward_hook(lambda module, args, out: out * layers[0].bias.mean())


def a_function_of_a_function(model: Three) -> None:
    def scale() -> Tensor:
        return model.c.bias.mean()

    model.a.register_forward_hook(lambda module, args, out: out * scale())


def a_function_of_itself(model: Three) -> None:
    def again(n: int) -> Tensor:
        return again(n - 1) if n else model.c.bias.mean()

    model.a.register_forward_hook(lambda module, args, out: out * again(2))


@pytest.mark.parametrize(
    "hold",
    [
        hook_on_the_root, hook_on_a_sibling, another_forward, a_default, in_a_list, a_function_of_a_function,
        a_function_of_itself,
    ],
)  # fmt: skip
def test_functions_of_a_copy_know_the_copy(hold: Callable[[Three], None]) -> None:
    torch.manual_seed(0)
    model, x = Three().double(), torch.randn(5, 4).double()
    hold(model)
    whole = model(x)
    net = pn.PlasticNet(model, (x,))
    assert {"a", "b"} & set(net.sites)
    assert torch.equal(net.model(x), whole)
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[:2] = -1.0
    small = net.eval().compact()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(x), net(x))
    kept = small(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(small(x), kept)


def test_what_a_function_holds_of_something_else_is_shared() -> None:
    model, teacher, seen = Three(), nn.Linear(3, 3), []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(len(out))
        return out + teacher(model.c.bias)

    model.c.register_forward_hook(hook)
    copied = deep_copy(model)
    new = next(iter(copied.c._forward_hooks.values()))
    cells = dict(zip(new.__code__.co_freevars, (c.cell_contents for c in new.__closure__), strict=True))
    assert cells["teacher"] is teacher
    assert cells["seen"] is seen
    assert cells["model"] is copied


def test_functions_without_the_model_are_shared() -> None:
    model, factor = Three(), 2.0
    model.c.register_forward_hook(hook := lambda module, args, out: out * factor)
    assert next(iter(deep_copy(model).c._forward_hooks.values())) is hook
