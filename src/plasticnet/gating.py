"""How gates enter a run of the model.

A gate multiplies what the consumers of its unit read. Gates that differ between samples multiply
the activation, in a hook that lives for one forward pass; gates that the whole batch shares are
folded into the consumers' weights, and so are those of single weights. `compact` folds by the same function.
Norms take their statistics over what is open, and closed blocks are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import checkpoint

from plasticnet.attention import unfused_layers
from plasticnet.errors import PlasticError
from plasticnet.norms import open_statistics
from plasticnet.prefix import Prefix, Watch
from plasticnet.units import BlockUnits, InputUnits, Units


@dataclass(frozen=True, eq=False)
class Reader:
    """One gated dimension of one parameter. ``units`` gives, for each of its positions, the index
    into the gates of all sites (the last one, which is always 1, where nothing gates it);
    ``features`` the same for the input site on top. ``select`` are the features present."""

    tensor: str
    dim: int
    module: str
    owner: nn.Module
    axis: int | None
    per_sample: bool
    units: Tensor
    features: Tensor | None
    select: Tensor | None
    full: int

    def multiplier(self, z: Tensor) -> Tensor:
        """What each position is multiplied by: (..., positions) from gates (..., units + 1)."""
        result = z.index_select(-1, self.units)
        return result if self.features is None else result * z.index_select(-1, self.features)


class Skip(nn.Module):
    """What is left of a block that was removed: it hands on its first input. So the other members of a
    list keep their places, which a forward may count."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        return args[0] if args else next(iter(kwargs.values()))


def gate_offsets(sites: Mapping[str, Units]) -> tuple[dict[str, int], int]:
    """Where each site's gates begin in the gates of all, and where the constant 1 is."""
    ends = np.cumsum([0, *(u.size for u in sites.values())]).tolist()
    return dict(zip(sites, ends, strict=False)), ends[-1]


def gate_positions(sites: Mapping[str, Units], key: tuple[str, int], length: int) -> np.ndarray:
    """For each position of one dimension of a tensor, the index of its gate."""
    offsets, one = gate_offsets(sites)
    positions = np.full(length, one)
    for name, u in sites.items():
        for s in u.slices:
            if (s.tensor, s.dim) == key:
                positions[s.index] = offsets[name] + np.arange(u.size)[:, None]
    return positions


def readers(sites: Mapping[str, Units], model: nn.Module) -> list[Reader]:
    """Every gated (parameter, dimension), in execution order."""
    offsets, _ = gate_offsets(sites)
    inputs = {u.consumers[0].tensor: u for u in sites.values() if isinstance(u, InputUnits)}
    shapes = dict(model.named_parameters())
    found: dict[tuple[str, int], Reader] = {}
    for consumer in dict.fromkeys(c for u in sites.values() for c in u.consumers):
        key = (consumer.tensor, consumer.dim)
        weight = shapes[consumer.tensor]
        feature = inputs.get(consumer.tensor)
        where = (feature.name, 0) if feature else key
        positions = gate_positions(sites, where, feature.full if feature else weight.shape[consumer.dim])
        per_sample = consumer.per_sample and consumer.axis is not None
        if key in found:  # several calls of one module: they differ in rank or batch at most
            per_sample = per_sample and found[key].per_sample and found[key].axis == consumer.axis
        device = weight.device
        features = select = None
        if feature is not None:
            positions = positions[feature.features]
            features = torch.arange(feature.size, device=device) + offsets[feature.name]
            select = torch.from_numpy(feature.features).to(device) if feature.size < feature.full else None
        full = feature.full if feature else len(positions)
        found[key] = Reader(
            consumer.tensor, consumer.dim, consumer.module, model.get_submodule(consumer.module), consumer.axis,
            per_sample, torch.from_numpy(positions).to(device), features, select, full,
        )  # fmt: skip
    return list(found.values())


def fold(parameters: Mapping[str, Tensor], found: list[Reader], z: Tensor) -> dict[str, Tensor]:
    """The consumers' weights times gates that the batch shares, z of shape (units + 1,), by name."""
    folded: dict[str, Tensor] = {}
    for r in found:
        weight = folded.get(r.tensor, parameters[r.tensor])
        shape = [1] * weight.dim()
        shape[r.dim] = -1
        folded[r.tensor] = weight * r.multiplier(z).to(weight.dtype).reshape(shape)
    return folded


class Gating:
    """Where the gates of these sites act on a model of their present size.

    ``per_sample`` says of each site whether it can draw once per sample: all its readers see samples
    as rows, and nothing takes statistics over its units.
    """

    def __init__(self, sites: Mapping[str, Units], model: nn.Module, weights: Iterable[str] = ()) -> None:
        """``weights`` are the names of the parameters whose entries have gates of their own."""
        self.model = model
        self.readers = readers(sites, model)
        offsets, _ = gate_offsets(sites)
        shapes = {name: t.shape for name, t in model.named_parameters()}
        device = next(model.parameters()).device
        self._blocks = [
            (model.get_submodule(block), offsets[name] + i)
            for name, u in sites.items()
            if isinstance(u, BlockUnits)
            for i, block in enumerate(u.blocks)
        ]
        self._normed = [(name, offsets[name], u.size) for name, u in sites.items() if u.norms]
        self._fused = any(isinstance(m, nn.TransformerEncoder | nn.TransformerEncoderLayer) for m in model.modules())
        norms = dict.fromkeys(n for u in sites.values() for n in u.norms)
        self._norms = [
            (
                model.get_submodule(n.module),
                n.axis,
                torch.from_numpy(gate_positions(sites, (n.tensor, n.dim), shapes[n.tensor][n.dim])).to(device),
            )
            for n in norms
        ]
        self._recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        self._places = _places(model, {r.tensor for r in self.readers} | set(weights))
        self.keep_results = False  # of a prefix, all of them: something has read what nothing seemed to hold
        self._known = [*model.parameters(), *model.buffers()]
        fixed = {(r.tensor, r.dim) for r in self.readers if not r.per_sample}
        self.per_sample = {
            name: bool(u.consumers) and not u.norms and not any((c.tensor, c.dim) in fixed for c in u.consumers)
            for name, u in sites.items()
        }

    def prefix(self) -> Prefix:
        """To record what a run of the model computes before its first gate."""
        return Prefix(self.model, {id(t): t for t in self._known}, keep=self.keep_results)

    def run(
        self,
        z: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        best: Mapping[str, Tensor] | None = None,
        *,
        all_open: bool = False,
        prefix: Callable[[Iterable[Tensor]], Watch] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Run the model under gates z of shape (units + 1,) or (rows, units + 1), 1 row for the whole
        batch or one per sample; the last is the constant 1.

        A norm over a site that is closed altogether counts one unit of it, as the cut network will: the
        one in ``best``, by the site's name, or the first. ``all_open`` says that all gates are 1: then
        the model runs as it is. ``prefix`` is `Prefix.recording` or `Prefix.replaying`. ``weights`` are gates of
        single weights, by the parameter's name and of its shape; without them all are open.

        What was compiled in place (``model.compile()``) runs compiled unless gates act by hooks or norms are
        masked, for those are not guarded against: then it runs as it was written.

        Raises `PlasticError` when layers are to be run again in the backward pass.
        """
        shared = z[0] if z.dim() == 2 else z
        per_sample = z.dim() == 2 and len(z) > 1
        hooked = [r for r in self.readers if r.per_sample] if per_sample else []
        folded = [r for r in self.readers if not (per_sample and r.per_sample)]
        parameters = self._parameters() if weights or not all_open else {}
        tensors = {name: parameters[name] * g.to(parameters[name].dtype) for name, g in (weights or {}).items()}
        with ExitStack() as stack:
            if any(_compiled(m) for m in self.model.modules()):
                prefix = None  # the compiler does not follow it
                if hooked or (not all_open and (self._norms or self._blocks)):
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
            if tensors or not all_open:
                if self._fused:
                    stack.enter_context(unfused_layers())
                if torch.is_grad_enabled():
                    stack.enter_context(_refusing_checkpoints())
            if not all_open:
                opened = shared > 0
                for name, start, size in self._normed:
                    part = opened[start : start + size]
                    part |= ~part.any() & (torch.arange(size, device=z.device) == (0 if best is None else best[name]))
                tensors |= fold({**parameters, **tensors}, folded, shared)
                for norm, axis, positions in self._norms:
                    stack.enter_context(open_statistics(norm, axis, opened.index_select(0, positions)))
                if self._blocks:
                    skipped = (shared == 0).tolist()
                    stack.enter_context(_skipping(module for module, i in self._blocks if skipped[i]))
            if tensors:
                stack.enter_context(_swapped(self._places, tensors, self._recurrent))
            watch = None if prefix is None else prefix(tensors.values())
            if watch is not None:
                gates = [m for m, *_ in (*self._blocks, *self._norms)]
                gates += [r.owner for r in (*hooked, *(r for r in folded if r.select is not None))]
                stack.enter_context(_before(gates, watch.end))
            stack.enter_context(_hooks(hooked, z))
            stack.enter_context(_hooks(folded, None))
            if watch is not None:
                stack.enter_context(watch)  # last: the work above is not the model's
                return watch.output(self.model(*args, **kwargs))
            return self.model(*args, **kwargs)

    def _parameters(self) -> dict[str, Tensor]:
        """The parameters that gates act on, as they are now."""
        return {name: held[0][0]._parameters[held[0][1]] for name, held in self._places.items()}  # pyright: ignore[reportReturnType]


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _places(model: nn.Module, names: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each of these parameters, the modules that hold it, and its name there."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, p in module._parameters.items():
            held.setdefault(id(p), []).append((module, leaf))
    return {name: held[id(parameters[name])] for name in names}


@contextmanager
def _swapped(
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
def _before(modules: list[nn.Module], act: Callable[..., None]) -> Iterator[None]:
    """Within this context ``act`` is called before each of these modules runs."""
    handles = [module.register_forward_pre_hook(act) for module in dict.fromkeys(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _refusing_checkpoints() -> Iterator[None]:
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
def _skipping(blocks: Iterator[nn.Module]) -> Iterator[None]:
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
def _hooks(found: list[Reader], z: Tensor | None) -> Iterator[None]:
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
