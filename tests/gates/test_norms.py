"""Masked norms: statistics over the open entries are those of the cut tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import PlasticNet
from plasticnet.gates.norms import OpenStatistics
from tests.kit.norms import GRN, RMS

MASK = torch.tensor([True, False, True, True, False, True, True])


ALL = frozenset({"mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"})


def open_statistics(module: nn.Module, axis: int, mask: Tensor) -> AbstractContextManager[None]:
    return OpenStatistics(module, axis, ALL).over(mask)


class Function(nn.Module):
    """A norm called as a function, with a module's parameters where it takes them."""

    def __init__(self, function: Callable[..., Tensor], width: int, **parameters: bool) -> None:
        super().__init__()
        self.function = function
        for name, there in parameters.items():
            setattr(self, name, nn.Parameter(torch.randn(width)) if there else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self._parameters)


def entries(module: nn.Module, keep: Tensor) -> nn.Module:
    """A copy of a module with these entries of its vectors."""
    small = copy.deepcopy(module)
    for name, p in list(small._parameters.items()):
        if p is not None:
            setattr(small, name, nn.Parameter(p[..., keep]))
    for attribute in ("normalized_shape", "num_channels"):
        if hasattr(small, attribute):
            n = int(keep.sum())
            setattr(small, attribute, (n,) if attribute == "normalized_shape" else n)
    if isinstance(small, Function):
        small.function = small.function(int(keep.sum()))
    return small


def layer(n: int, call: Any = F.layer_norm) -> Callable[..., Tensor]:
    return lambda x, **p: call(x, (n,), *p.values(), eps=1e-3)


def root(n: int, call: Any = F.rms_norm) -> Callable[..., Tensor]:
    return lambda x, **p: call(x, (n,), *p.values())


def group(n: int, call: Any = F.group_norm) -> Callable[..., Tensor]:
    return lambda x, **p: call(x, 1, *p.values(), 1e-2)


def function(make: Any, both: bool, there: bool) -> Callable[[int], nn.Module]:
    names = {"weight": there, "bias": there} if both else {"weight": there}
    return lambda n: Function(make, n, **names)


NORMS: dict[str, tuple[Callable[[int], nn.Module], int]] = {  # a module for a width, and the axis of its units
    "LayerNorm": (nn.LayerNorm, -1),
    "LayerNorm without bias": (partial(nn.LayerNorm, bias=False, eps=0.1), -1),
    "LayerNorm, plain": (partial(nn.LayerNorm, elementwise_affine=False), -1),
    "F.layer_norm": (function(layer, True, True), -1),
    "F.layer_norm, plain": (function(layer, True, False), -1),
    "torch.layer_norm": (function(partial(layer, call=torch.layer_norm), True, True), -1),
    "RMSNorm": (nn.RMSNorm, -1),
    "RMSNorm with eps": (partial(nn.RMSNorm, eps=0.1), -1),
    "RMSNorm, plain": (partial(nn.RMSNorm, elementwise_affine=False), -1),
    "F.rms_norm": (function(root, False, True), -1),
    "torch.rms_norm, plain": (function(partial(root, call=torch.rms_norm), False, False), -1),
    "GroupNorm": (partial(nn.GroupNorm, 1), -3),
    "GroupNorm, plain": (partial(nn.GroupNorm, 1, affine=False, eps=0.1), -3),
    "F.group_norm": (function(group, True, True), -3),
    "torch.group_norm": (function(partial(group, call=torch.group_norm), True, True), -3),
    "mean, method": (RMS, -1),
    "mean, dim by name": (partial(RMS, way="keywords"), -1),
    "mean, axis dropped": (partial(RMS, way="dropped"), -1),
    "mean, counted from the front": (partial(RMS, way="front"), -1),
    "GRN": (GRN, -1),
}


def build(name: str) -> tuple[nn.Module, int, Tensor]:
    """A norm for as many channels as the mask has, its axis, and an input."""
    make, axis = NORMS[name]
    module = make(len(MASK)).double()
    for p in module.parameters():
        nn.init.normal_(p)
    shape = (2, len(MASK), 3, 4) if axis == -3 else (2, 3, 4, len(MASK))
    return module, axis, torch.randn(shape).double() * 2 + 1


def bound(module: nn.Module) -> nn.Module:
    """A `Function` knows its width only now."""
    module = copy.deepcopy(module)
    if isinstance(module, Function):
        module.function = module.function(len(MASK))
    return module


@pytest.mark.parametrize("name", NORMS)
def test_open_statistics_are_those_of_the_cut_tensor(name: str) -> None:
    module, axis, x = build(name)
    keep = MASK.nonzero()[:, 0]
    expected = entries(module, MASK)(x.index_select(axis, keep))
    run = bound(module)
    with open_statistics(run, axis, MASK):
        found = run(x).index_select(axis, keep)
        assert torch.equal(found, run(x).index_select(axis, keep))
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (run(x).index_select(axis, keep) - expected).abs().max() > 1e-3  # the context is over


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "mean, method", "GRN"])
def test_gradients(name: str) -> None:
    module, axis, x = build(name)
    names = list(dict(module.named_parameters()))
    x = x[:1, :, :2, :2] if axis == -3 else x[:1, :1, :2]
    inputs = [t.detach().requires_grad_() for t in (x, *module.parameters())]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        with open_statistics(module, axis, MASK):
            out = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return out.index_select(axis, MASK.nonzero()[:, 0])

    assert torch.autograd.gradcheck(run, inputs)
    (gradient,) = torch.autograd.grad(run(*inputs).pow(3).sum(), inputs[:1])
    assert (gradient.movedim(axis, 0)[~MASK] == 0).all()  # what is closed moves nothing


def test_means_over_something_else_are_left_alone() -> None:
    class Means(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.mean(), x.mean(0).mean(0), x.mean((0, 1)).sum(), x[:, :3].mean(-1).sum()])

    module, x = Means(), torch.randn(5, len(MASK))
    expected = module(x)
    with open_statistics(module, -1, MASK):
        found = module(x)
    assert torch.equal(found[3], expected[3])
    assert torch.equal(found[0], expected[0])  # of everything, which tracing freezes
    torch.testing.assert_close(found[2], x[:, MASK].mean())  # over the gated axis and another one
    torch.testing.assert_close(found[1], x.mean(0)[MASK].mean())  # over the gated axis


BY_NAME = {
    "F.layer_norm": lambda x: F.layer_norm(input=x, normalized_shape=x.shape[-1:]),
    "F.rms_norm": lambda x: F.rms_norm(input=x, normalized_shape=x.shape[-1:]),
    "F.group_norm": lambda x: F.group_norm(input=x.movedim(-1, 1), num_groups=1),
    "torch.mean": lambda x: torch.mean(input=x, dim=-1, keepdim=True),
    "torch.layer_norm": lambda x: torch.layer_norm(input=x, normalized_shape=x.shape[-1:]),
    "torch.rms_norm": lambda x: torch.rms_norm(input=x, normalized_shape=x.shape[-1:]),
    "torch.group_norm": lambda x: torch.group_norm(input=x.movedim(-1, 1), num_groups=1),
}


@pytest.mark.parametrize("call", [pytest.param(f, id=n) for n, f in BY_NAME.items()])
def test_inputs_by_name(call: Callable[[Tensor], Tensor]) -> None:
    module, x = Function(call, 0), torch.randn(2, 3, len(MASK)).double()
    with open_statistics(module, -1, MASK):
        found = module(x)
    expected = call(x[..., MASK])
    axis = 1 if expected.shape[1] == MASK.sum() else -1
    found = found if found.shape[axis] == 1 else found.movedim(axis, 0)[MASK].movedim(0, axis)
    assert (found - expected).abs().max() <= 1e-12


def test_nothing_outlives_an_exception() -> None:
    norm, x = nn.LayerNorm(len(MASK)), torch.randn(2, len(MASK))
    expected = norm(x)
    with open_statistics(norm, -1, MASK):
        with pytest.raises((RuntimeError, TypeError, AttributeError)):
            norm("no tensor")
        assert torch.equal(F.layer_norm(x, (len(MASK),)), expected)  # outside of the module
        assert not torch.equal(norm(x), expected)
    assert torch.equal(norm(x), expected)
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks


def test_half_precision_takes_statistics_in_single() -> None:
    x = torch.full((1, 2048), 300.0).bfloat16()
    x[:, ::2] = -300.0
    norm, mask = nn.LayerNorm(2048).bfloat16(), torch.arange(2048) < 2000
    with open_statistics(norm, -1, mask):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[:, :2000], norm(x)[:, :2000])


@pytest.mark.parametrize("call", [F.group_norm, torch.group_norm])
@pytest.mark.parametrize("positions", [(), (1,), (5,), (2, 3, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_groups_at_any_number_of_positions(call: Any, positions: tuple[int, ...], affine: bool) -> None:
    def one_group(_: int) -> Callable[..., Tensor]:
        return lambda x, **p: call(x, 1, p.get("weight"), p.get("bias"), 1e-2)

    module = Function(one_group, len(MASK), weight=affine, bias=affine).double()
    x, keep = torch.randn(2, len(MASK), *positions).double(), MASK.nonzero()[:, 0]
    expected = entries(module, MASK)(x.index_select(1, keep))
    run = bound(module)
    with open_statistics(run, -1 - len(positions), MASK):
        found = run(x)
    assert found.shape == x.shape
    assert (found.index_select(1, keep) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 5)])
def test_a_network_that_normalises_all_channels_as_one_group(shape: tuple[int, ...]) -> None:
    layer = nn.Linear if len(shape) == 1 else partial(nn.Conv1d, kernel_size=1)
    model = nn.Sequential(layer(3, 8), nn.GroupNorm(1, 8), nn.ReLU(), layer(8, 2)).double()
    x = torch.randn(4, 3, *shape[1:]).double()
    net = PlasticNet(model, (x,), residual=True).eval()
    assert net.sites["0"].units.norms
    net.k = math.inf
    with torch.no_grad():
        net.sites["0"].phi[::3] = -1.0
    assert (net(x) - net.compact()(x)).abs().max() <= 1e-12
    net.prune()
    assert net.model[1].num_channels == 5
