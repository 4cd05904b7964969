"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import checkpoint

from plasticnet.errors import PlasticError
from plasticnet.gates.readers import Reader
from plasticnet.layers.skip import Skip


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def places_of(model: nn.Module, names: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each of these parameters, the modules that hold it, and its name there."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, p in module._parameters.items():
            held.setdefault(id(p), []).append((module, leaf))
    return {name: held[id(parameters[name])] for name in names}


@contextmanager
def swapped(
    places: Mapping[str, list[tuple[nn.Module, str]]], tensors: Mapping[str, Tensor], recurrent: list[nn.RNNBase]
) -> Iterator[None]:
    """Within this context modules hold ``tensors`` in the place of their parameters of these names.
    (As ``torch.func.functional_call``, at less cost; recurrent layers read a list of their own, too.)"""
    own = [(module, leaf, module._parameters[leaf]) for name in tensors for module, leaf in places[name]]
    lists: list[list[Any]] = [module._flat_weights for module in recurrent]
    for name, tensor in tensors.items():
        for module, leaf in places[name]:
            module._parameters[leaf] = tensor  # pyright: ignore[reportArgumentType]
    for module in recurrent:
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    try:
        yield
    finally:
        for module, leaf, parameter in own:
            module._parameters[leaf] = parameter
        for module, weights in zip(recurrent, lists, strict=True):
            module._flat_weights = weights


@contextmanager
def called_before(modules: list[nn.Module], act: Callable[..., None]) -> Iterator[None]:
    """Within this context ``act`` is called before each of these modules runs."""
    handles = [module.register_forward_pre_hook(act) for module in dict.fromkeys(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def refusing_checkpoints() -> Iterator[None]:
    """Gradient checkpointing would run layers again when their gates are gone, and give wrong gradients."""
    names = [n for n in _CHECKPOINTING if hasattr(checkpoint, n)]
    kept = [getattr(checkpoint, name) for name in names]
    for name in names:
        setattr(checkpoint, name, _Refused())
    try:
        yield
    finally:
        for name, own in zip(names, kept, strict=True):
            setattr(checkpoint, name, own)


# What torch.utils.checkpoint.checkpoint calls, in one version of torch or another.
_CHECKPOINTING = ("_checkpoint_impl", "CheckpointFunction", "_checkpoint_without_reentrant_generator")


class _Refused:
    def __call__(self, *_: Any, **__: Any) -> Any:
        raise PlasticError(
            "gradient checkpointing (torch.utils.checkpoint) cannot be used while units are gated: the layers would "
            "run again without their gates; switch it off for training with finite k or closed units"
        )

    apply = __call__


@contextmanager
def skipping(blocks: Iterator[nn.Module]) -> Iterator[None]:
    """Within this context these modules hand on their first input."""
    skipped = list(blocks)
    own = [module.__dict__.get("forward") for module in skipped]
    for module in skipped:
        module.forward = Skip.forward.__get__(module)
    try:
        yield
    finally:
        for module, forward in zip(skipped, own, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.forward = forward


@contextmanager
def gated_inputs(found: list[Reader], z: Tensor | None) -> Iterator[None]:
    """Within this context the consumers' inputs are selected (input sites) and multiplied by
    per-sample gates ``z`` of shape (batch, units + 1), if any."""
    handles = []
    for r in found:
        if r.select is not None or z is not None:
            multiplier = None if z is None else r.multiplier(z)
            handles.append(r.owner.register_forward_pre_hook(_hook(r, multiplier)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(reader: Reader, multiplier: Tensor | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        assert reader.axis is not None
        if reader.select is not None:
            x = x.index_select(reader.axis, reader.select)
        if multiplier is not None:
            if x.shape[0] != len(multiplier):
                raise PlasticError(
                    f"{reader.module} reads {x.shape[0]} rows, but gates were drawn for {len(multiplier)} samples; "
                    'construct PlasticNet with gates="batch"'
                )
            shape = [1] * x.dim()
            shape[0], shape[reader.axis] = len(multiplier), multiplier.shape[1]
            z = multiplier.to(x.dtype)
            own = type(module).__module__.startswith("torch.nn.")  # others may change their input in place
            sparing = own and z.requires_grad and not (x.is_cuda or x.is_complex() or is_functorch_wrapped_tensor(x))
            x = _Gated.apply(x, z, reader.axis) if sparing else x * z.reshape(shape)
        return (x, *args[1:])

    return hook


class _Gated(torch.autograd.Function):
    """``x`` times gates (rows, units) that lie along ``axis``, whose gradient is wanted, too. It takes little memory:
    the product, which the layer behind keeps anyway, and of x only what is closed. (On a GPU finding that would mean
    waiting for it.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, axis: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.axis, closed = axis, z == 0
        shape = [1] * x.dim()
        shape[0], shape[axis] = z.shape
        product = x * z.reshape(shape)
        ctx.save_for_backward(product, z, closed, x.movedim(axis, 1)[closed])
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        product, z, closed, left = ctx.saved_tensors
        by_unit = grad.movedim(ctx.axis, 1)
        slopes = (by_unit * product.movedim(ctx.axis, 1)).reshape(*z.shape, -1).sum(2)
        slopes = slopes / torch.where(closed, 1, z)
        slopes[closed] = (by_unit[closed] * left)[..., None].flatten(1).sum(1)
        return (by_unit * _wide(z, grad)).movedim(1, ctx.axis), slopes, None


def _wide(z: Tensor, x: Tensor) -> Tensor:
    """``z``, shape (rows, units), for the axes of ``x`` with the units in the second place."""
    return z.reshape(*z.shape, *[1] * (x.dim() - 2))
