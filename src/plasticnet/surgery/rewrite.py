"""Rewrites the tensors of a model, its gates and the state of its optimizers by the plan of a resize."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plasticnet.errors import PlasticError
from plasticnet.surgery.attributes import shift_widths, update_attributes, weights_of
from plasticnet.surgery.optimizers import check_optimizers, rebind
from plasticnet.surgery.plan import Plan
from plasticnet.tools.lengths import with_kept_scale
from plasticnet.tools.sharding import Shards, distributed, gathered
from plasticnet.tools.torch_private import (
    BatchOrInstanceNorm,
    buffers_of,
    flat_weights,
    parameters_of,
    set_flat_weights,
)

INITS = ("preserve", "random", "paper")


def apply_plan(
    model: nn.Module,
    plan: Plan,
    gates: Mapping[str, tuple[nn.Parameter, float]],
    optimizers: Sequence[Optimizer] = (),
    init: str = "preserve",
    weights: Mapping[str, tuple[nn.Parameter, float]] | None = None,
) -> dict[nn.Parameter, nn.Parameter]:
    """Rewrite a model's tensors, the logits of its gates and the state of its optimizers by a plan.

    The model and the optimizers then hold only new parameters. New logits are returned, and are not put into the
    network.

    Args:
        model: The model.
        plan: The plan.
        gates: For each site its logits, and the value that new ones get.
        optimizers: The optimizers that hold all trainable parameters; none are needed.
        init: How new units begin: with random incoming weights, and outgoing ones of zero ("preserve", so that the
            model computes what it did before) or random ones too ("random" and "paper").
        weights: For each parameter whose entries have gates, their logits, and the value that new ones get.

    Returns:
        The new parameter for each old one, logits included.

    Raises:
        PlasticError: ``init`` is unknown, or the optimizers do not hold every trainable parameter or cannot be resized.
            Nothing was changed.
    """
    if init not in INITS:
        raise PlasticError(f"init={init!r}: choose one of {', '.join(INITS)}")
    shards = Shards(model)  # brings the parameters back to their parts, and so comes first
    parameters = dict(model.named_parameters())
    every = [*gates.items(), *(weights or {}).items()]
    check_optimizers(optimizers, {**parameters, **{f"the gates of {n}": p for n, (p, _) in every}})
    by_tensor: dict[str, dict[int, _Take]] = {}
    for (tensor, dim), take in plan.takes.items():
        by_tensor.setdefault(tensor, {})[dim] = _Take(take)
    by_site = {site: {0: _Take(source)} for site, source in plan.sources.items()}
    for name, takes in by_tensor.items():
        if name in parameters:
            shards.check(name, parameters[name], {dim: take.length for dim, take in takes.items()})
    named = weights_of(model, by_tensor)
    with torch.no_grad():
        rewritten = [
            *_rewritten_tensors(model, by_tensor, plan, init),
            *_rewritten_logits(gates, by_site),
            *_rewritten_logits(weights or {}, by_tensor),
        ]
        takes_of = {old: takes for old, _, takes in rewritten}
        moved = {o: n for o, n, _ in rewritten if isinstance(o, nn.Parameter) and isinstance(n, nn.Parameter)}
        for old, new in moved.items():
            if old.grad is not None:
                new.grad = _rewrite_part(old.grad, takes_of[old])
        replace_tensors(model, [(old, new) for old, new, _ in rewritten])
        shards.take(moved.items())
        for optimizer in optimizers:
            rebind(optimizer, moved, lambda old, value, mean: _rewrite_part(value, takes_of[old], mean))
    shift_widths(model, plan.shifts)
    update_attributes(model, plan.takes, plan.groups, named)
    return moved


def _rewritten_tensors(
    model: nn.Module, by_tensor: Mapping[str, Mapping[int, _Take]], plan: Plan, init: str
) -> Iterator[_Rewritten]:
    """Yield the parameters and buffers of these names, each rewritten, with the values that new units begin with."""
    tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    lengths = {name: length for name, length in plan.lengths.items() if by_tensor.get(name, {}).keys() - {length[1]}}
    apart = {name for direction, (length, _) in lengths.items() for name in (direction, length)}
    for name in [*(n for n in by_tensor if n not in apart), *lengths]:
        group = [name, lengths[name][0]] if name in lengths else [name]
        whole = {n: _rewritten(model, n, tensors[n], by_tensor.get(n, {}), plan.consumed, init) for n in group}
        if name in lengths:
            length, dim = lengths[name]
            old = _rewrite(gathered(tensors[name]), {d: t for d, t in by_tensor[name].items() if d == dim})
            whole[name], whole[length] = with_kept_scale(old, whole[name], whole[length], dim)
        for n, new in whole.items():
            old, new = tensors[n], distributed(new, tensors[n])
            is_parameter = isinstance(old, nn.Parameter)
            yield old, nn.Parameter(new, old.requires_grad) if is_parameter else new, by_tensor.get(n, {})


def _rewritten(
    model: nn.Module, name: str, old: Tensor, takes: Mapping[int, _Take], consumed: set[tuple[str, int]], init: str
) -> Tensor:
    """Return a tensor, of which no process holds a part only, rewritten and with the values of new units."""
    new = _rewrite(gathered(old), takes)
    _initialise(model, name, new, takes, consumed, init)
    return new


def _rewritten_logits(
    gates: Mapping[str, tuple[nn.Parameter, float]], takes_by_name: Mapping[str, Mapping[int, _Take]]
) -> Iterator[_Rewritten]:
    """Yield the logits whose units or entries change, each rewritten, with new ones at the value given for them."""
    for name, (logits, value) in gates.items():
        takes = takes_by_name.get(name)
        if takes is not None:
            new = _rewrite(logits, takes)
            for dim, take in takes.items():
                new[_at(dim, take.fresh)] = value
            yield logits, nn.Parameter(new, requires_grad=logits.requires_grad), takes


def rewrite(tensor: Tensor, takes: Mapping[int, np.ndarray], mean: bool = False) -> Tensor:
    """Return a copy of a tensor in which each dimension is made up of old positions.

    Args:
        tensor: The tensor.
        takes: For each dimension that changes, the old positions; -1 is a new one.
        mean: Whether new entries are the mean over the kept ones. Otherwise they are 0.
    """
    return _rewrite(tensor, {dim: _Take(take) for dim, take in takes.items()}, mean)


class _Take:
    """How one dimension is rewritten; slices are used where they will do, because they are faster than indices.

    Args:
        take: The old positions, with -1 for new ones.

    Attributes:
        kept: The new positions of what is kept.
        fresh: The new positions of what is new.
        source: The old positions from which ``target`` is filled.
        target: The new positions that are filled first. They are the kept ones where these are a slice. Otherwise they
            are all positions, and those in ``fresh`` are filled once more afterwards.
    """

    def __init__(self, take: np.ndarray) -> None:
        places = np.flatnonzero(take >= 0)
        self.length, self.empty, self.grows = len(take), len(places) == 0, len(places) < len(take)
        self.kept, self.fresh = _where(places), _where(np.flatnonzero(take < 0))
        self.target = self.kept if isinstance(self.kept, slice) else slice(None)
        self.source = _where(take[places] if isinstance(self.kept, slice) else np.maximum(take, 0))


_Rewritten = tuple[Tensor, Tensor, Mapping[int, _Take]]  # the old tensor, the new one, and how its dimensions changed


def _where(positions: np.ndarray) -> slice | Tensor:
    """Return positions as a slice where they follow each other, and otherwise as indices."""
    if (np.diff(positions) == 1).all():
        first = int(positions[0]) if len(positions) else 0
        return slice(first, first + len(positions))
    return torch.from_numpy(positions)


def _part(tensor: Tensor, dim: int, where: slice | Tensor) -> Tensor:
    """Return what lies at these positions of a dimension: a view for a slice, and otherwise a copy."""
    return tensor[_at(dim, where)] if isinstance(where, slice) else tensor.index_select(dim, where.to(tensor.device))


def _at(dim: int, where: slice | Tensor) -> tuple[slice | Tensor, ...]:
    """Return what a tensor is indexed with for these positions of a dimension."""
    return (*[slice(None)] * dim, where)


def _rewrite(tensor: Tensor, takes: Mapping[int, _Take], mean: bool = False) -> Tensor:
    """Return what `rewrite` does, from dimensions that were worked out."""
    new = tensor.detach()
    steps = [[item] for item in takes.items()]  # Dimension 0 comes first, because its rows are contiguous.
    if all(isinstance(t.source, slice) and t.source == slice(0, new.shape[dim]) for dim, t in takes.items()):
        steps = [list(takes.items())]  # Nothing is cut, so that all dimensions grow at once.
    for step in steps:
        for dim, take in step:
            new = _part(new, dim, take.source)
        if any(take.grows for _, take in step):
            lengths = {dim: take.length for dim, take in step}
            kept, new = new, new.new_empty([lengths.get(dim, n) for dim, n in enumerate(new.shape)])
            _fill(new, kept, step, mean)
    for memory_format, rank in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if rank == tensor.dim() and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=memory_format):
            return new.clone(memory_format=memory_format)
    shared = new.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return new.clone(memory_format=torch.contiguous_format) if shared else new.contiguous()


def _rewrite_part(tensor: Tensor, takes: Mapping[int, _Take], mean: bool = False) -> Tensor:
    """Return what `_rewrite` does; a tensor of which every process holds a part is gathered, and sharded again."""
    return distributed(_rewrite(gathered(tensor), takes, mean), tensor)


def _fill(new: Tensor, kept: Tensor, takes: Sequence[tuple[int, _Take]], mean: bool) -> None:
    """Fill a new tensor with what is kept, and then with what is new, one dimension after the other.

    Args:
        new: The tensor to fill.
        kept: What is kept of the old one.
        takes: The dimensions that change, and how.
        mean: Whether new entries are the mean over the kept ones. Otherwise they are 0.
    """
    if not takes:
        new.copy_(kept)
        return
    *others, (dim, take) = takes
    _fill(_part(new, dim, take.target), kept, others, mean)
    if take.grows:
        average = mean and not take.empty
        new[_at(dim, take.fresh)] = _part(new, dim, take.kept).mean(dim, keepdim=True) if average else 0


def _initialise(
    model: nn.Module, name: str, new: Tensor, takes: Mapping[int, _Take], consumed: set[tuple[str, int]], init: str
) -> None:
    """Give the new entries of a rewritten tensor, which are zero, their initial values.

    New rows of weights are uniform within 1 / sqrt(fan in), as in torch's layers, and new entries of masks are 1. With
    ``init`` "preserve", entries that read new units stay zero.

    Args:
        model: The model.
        name: The name of the tensor.
        new: The rewritten tensor, which is changed in place.
        takes: The dimensions that changed, and how.
        consumed: The dimensions over which a contraction sums.
        init: One of `INITS`.
    """
    for dim, take in takes.items():
        if not take.grows or ((name, dim) in consumed and init == "preserve"):
            continue
        if _is_mask(model, name, new):
            new[_at(dim, take.fresh)] = 1
        elif new.dim() > 1 and (new.is_floating_point() or new.is_complex()):
            outputs = new.shape[0 if (name, dim) in consumed else dim]
            bound = (outputs / max(new.numel(), 1)) ** 0.5  # 1 / sqrt(fan in), as in torch's layers
            added = torch.empty_like(_part(new, dim, take.fresh), memory_format=torch.contiguous_format)
            (torch.view_as_real(added) if new.is_complex() else added).uniform_(-bound, bound)
            new[_at(dim, take.fresh)] = added
        else:
            new[_at(dim, take.fresh)] = _vector_value(model, name, new, take)


def _is_mask(model: nn.Module, name: str, new: Tensor) -> bool:
    """Return whether a tensor is a buffer that says which entries of a weight count, as of torch.nn.utils.prune."""
    named = new.dim() > 1 or name.endswith("mask")
    return named and name in dict(model.named_buffers()) and bool(((new == 0) | (new == 1)).all())


def _vector_value(model: nn.Module, name: str, new: Tensor, take: _Take) -> float:
    """Return the value of new entries of a vector.

    It is 0 for a bias and a running mean, and 1 for a running variance and the scale of a norm. In other vectors it is
    the mean of the kept entries.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    norm = isinstance(module, BatchOrInstanceNorm | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
    if leaf in ("bias", "running_mean"):
        return 0.0
    if leaf == "running_var" or (norm and leaf == "weight"):
        return 1.0
    kept = _part(new, 0, take.kept) if new.dim() == 1 else new
    return kept.to(torch.complex128 if new.is_complex() else torch.float64).mean().item() if kept.numel() else 0.0


def replace_tensors(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put the second tensor of each pair wherever the model holds the first, which may be in several places."""
    held = [(old, new) for old, new in pairs]  # This keeps the tensors alive, so that their ids stay unique.
    new_of = {id(old): new for old, new in held}
    for module in model.modules():
        for store in (parameters_of(module), buffers_of(module)):
            for key, value in store.items():
                if id(value) in new_of:
                    store[key] = new_of[id(value)]  # pyright: ignore[reportArgumentType]
        if isinstance(module, nn.RNNBase):
            set_flat_weights(module, [new_of.get(id(w), w) for w in flat_weights(module)])
