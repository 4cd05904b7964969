"""Makes modules act under gates for the time of a run: with other weights or gated inputs, or as skipped blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from plasticnet.errors import PlasticError
from plasticnet.gates.readers import Reader, multiplied
from plasticnet.layers.skip import Skip
from plasticnet.tools.lending import lend, take_back
from plasticnet.tools.shapes import along
from plasticnet.tools.sharding import is_sharded
from plasticnet.tools.torch_private import (
    after_backward,
    flat_names,
    flat_weights,
    is_scripted,
    is_transformed,
    parameters_of,
    set_flat_weights,
)


def places_of(model: nn.Module, names: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return for each of these parameters the modules that hold it, each with the parameter's name in that module.

    Args:
        model: The model.
        names: Names of parameters of the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, p in parameters_of(module).items():
            held.setdefault(id(p), []).append((module, leaf))
    return {name: held[id(parameters[name])] for name in names}


@contextmanager
def swapped(
    places: Mapping[str, list[tuple[nn.Module, str]]],
    tensors: Mapping[str, Tensor],
    recurrent: list[nn.RNNBase],
    compiled: bool = False,
) -> Iterator[None]:
    """Let modules hold other tensors in the place of their parameters within this context, for this thread only.

    It does what ``torch.func.functional_call`` does, at less cost, and also replaces the list of weights that recurrent
    layers read. Other threads go on finding the parameters, unless the model is compiled.

    Args:
        places: For each name of a parameter, the modules that hold it and its name there, from `places_of`.
        tensors: The tensors, by the names of the parameters that they replace.
        recurrent: The recurrent layers of the model.
        compiled: Whether a module of the model is compiled, or being so.
    """
    held: dict[nn.Module, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for module, leaf in places[name]:
            held.setdefault(module, {})[leaf] = tensor
    lists: list[list[Any]] = [flat_weights(module) for module in recurrent]
    exchanged = {module for module in held if compiled or is_scripted(module)}
    put_back = [_back(module, replaced, module in exchanged) for module, replaced in held.items()]

    def end() -> None:
        for back in put_back:
            back()
        for module, weights in zip(recurrent, lists, strict=True):
            set_flat_weights(module, weights)

    try:
        for module, replaced in held.items():
            if module in exchanged:
                parameters_of(module).update(replaced)  # pyright: ignore[reportArgumentType, reportCallIssue]
            else:
                lend(module, replaced)
        for module in recurrent:
            set_flat_weights(module, [getattr(module, name) for name in flat_names(module)])
        yield
    finally:
        try:
            end()
        except KeyboardInterrupt:  # the model would go on with the other tensors
            end()
            raise


def _back(module: nn.Module, tensors: Mapping[str, Tensor], exchanged: bool) -> Callable[[], object]:
    """Return what puts the parameters of a module back, however often, in whose place these tensors will be."""
    own = parameters_of(module)
    if exchanged:
        return partial(own.update, {leaf: own[leaf] for leaf in tensors})
    return partial(take_back, module, own)


@contextmanager
def skipping(skipped: Sequence[nn.Module], tied: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Let these modules return their first input within this context.

    Args:
        skipped: The modules.
        tied: Those whose parameters get gradients of zero all the same, because another process runs them.
    """
    own = [module.__dict__.get("forward") for module in skipped]
    for module in skipped:
        module.forward = (_skip_tied if any(module is m for m in tied) else Skip.forward).__get__(module)
    try:
        yield
    finally:
        for module, forward in zip(skipped, own, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.forward = forward


def _skip_tied(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return the first input of a module, so that its parameters get gradients of zero."""
    trained = [p for p in module.parameters() if p.requires_grad and not is_sharded(p)]
    return tied_to(trained, Skip.forward(cast(Any, module), *args, **kwargs))


def tied_to(parameters: Sequence[Tensor], output: Any, after: Callable[[], None] | None = None) -> Any:
    """Return an output so that gradients of it reach some parameters, as zeros.

    Args:
        parameters: The parameters.
        output: What a module returns.
        after: What is called at the end of the backward pass.
    """
    if not parameters or not torch.is_grad_enabled():
        return output

    def tie(t: Tensor) -> Any:
        return _Tied.apply(t, after, *parameters) if t.is_floating_point() or t.is_complex() else t

    return tree_map_only(Tensor, tie, output)


class _Tied(torch.autograd.Function):
    """A tensor as it is; the backward pass gives the parameters gradients of zero, and calls ``after`` at its end."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, after: Any, *parameters: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.after = after
        ctx.like = [(p.new_zeros(()), p.shape) for p in parameters]
        return t.clone()  # a view could not be changed in place by the caller

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.after is not None:
            after_backward(ctx.after)
        return grad, None, *(zero.expand(shape) for zero, shape in ctx.like)


def input_hooks(found: Sequence[Reader], z: Tensor | None) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return the hooks that change the inputs of consumers, each with its module, for `hooked`.

    The input of a consumer with an input site is reduced to the features that are present. With gates, the input is
    then multiplied by them.

    Args:
        found: The readers whose modules are changed.
        z: Gates for every sample, shape (batch, units + 1), or None where inputs are only reduced.
    """
    return [
        (r.owner, _hook(r, None if z is None else r.multiplier(z)))
        for r in found
        if r.select is not None or z is not None
    ]


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let modules have these forward pre-hooks within this context."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(reader: Reader, multiplier: Tensor | None) -> Callable[..., Any]:
    """Return a forward pre-hook that selects features and multiplies gates (batch, positions) into the input."""

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
            sparing = multiplier.requires_grad and _may_spare(module, x)
            x = Gated.apply(x, multiplier, reader.axis) if sparing else multiplied(x, multiplier, (0, reader.axis))
        return (x, *args[1:])

    return hook


def _may_spare(module: nn.Module, x: Tensor) -> bool:
    """Return whether `Gated` may multiply the input of a module; a module of the user may change its input in place."""
    if torch.compiler.is_dynamo_compiling():  # The compiler itself chooses what is kept for the backward pass.
        return False
    own = type(module).__module__.startswith("torch.nn.")
    return own and not (x.is_cuda or x.is_complex() or is_transformed(x))


class Gated(torch.autograd.Function):
    """Multiplies a tensor by gates whose gradient is wanted, with little memory for the backward pass.

    It keeps the product, which the next layer keeps anyway, and only those entries of the tensor whose gate is closed.
    (It is not used on a GPU, where finding these entries would mean waiting for the device.) The slopes are summed in
    the precision of the gates, since in half precision a sum overflows where none of its terms does. The arguments are
    the tensor; the gates, shape (rows, units); and the axis of the tensor along which the units lie.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, axis: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.axis, closed = axis, z == 0
        product = x * along(z.to(x.dtype), (0, axis), x.dim())
        ctx.save_for_backward(product, z, closed, x.movedim(axis, 1)[closed])
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        product, z, closed, left = ctx.saved_tensors
        by_unit = grad.movedim(ctx.axis, 1)
        wide = by_unit.to(torch.promote_types(grad.dtype, z.dtype))
        slopes = (wide * product.movedim(ctx.axis, 1)).reshape(*z.shape, -1).sum(2)
        slopes = slopes / torch.where(closed, 1, z)
        slopes[closed] = (wide[closed] * left)[..., None].flatten(1).sum(1)
        return (by_unit * along(z.to(grad.dtype), (0, 1), grad.dim())).movedim(1, ctx.axis), slopes.to(z.dtype), None
