"""Resize: the one operation for growth and pruning.

For each site a list of source indices: ``[0, 2, 3, -1, -1]`` keeps three units and adds two. A
`Plan` says, for every dimension of every tensor, which old positions make up the new ones (-1 for
new); `apply` rewrites parameters, buffers, module attributes and the optimizers' state by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plasticnet.attributes import shift_widths, update_attributes
from plasticnet.errors import PlasticError
from plasticnet.optimizers import check_optimizers, rebind
from plasticnet.units import BlockUnits, InputUnits, Units, Width

Sources = Mapping[str, Sequence[int]]
INITS = ("preserve", "random", "paper")


@dataclass
class Plan:
    """What a resize does: ``takes[tensor, dim]`` are old positions, -1 for new; ``sources[site]``
    old units; ``units`` the sites as they will be."""

    takes: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    sources: dict[str, np.ndarray] = field(default_factory=dict)
    units: dict[str, Units] = field(default_factory=dict)
    consumed: set[tuple[str, int]] = field(default_factory=set)
    groups: dict[str, int] = field(default_factory=dict)  # grouped layers: rows of one group
    shifts: list[tuple[Width, int]] = field(default_factory=list)  # attributes, by how many units they grow


# -- planning ---------------------------------------------------------------------------------


def plan(sites: Mapping[str, Units], lengths: Mapping[tuple[str, int], int], sources: Sources) -> Plan:
    """Check the sources and work out the new positions; ``lengths`` are the dimensions' sizes.

    Raises `PlasticError` for an unknown site, an index out of range or out of order, a site that
    would be left without units, or more features than an input site has.
    """
    result = Plan(sources={name: _checked(sites, name, s) for name, s in sources.items()})
    inputs = {name: u for name, u in sites.items() if isinstance(u, InputUnits)}
    for name, u in inputs.items():
        full_take, _ = _positions(sites, result.sources, (name, 0), u.full)
        _plan_features(u, full_take, result)
    touched = {(s.tensor, s.dim) for name in result.sources for s in sites[name].slices}
    indices: dict[tuple[str, int, str], np.ndarray] = {}
    for key in sorted(touched):
        length = inputs[key[0]].full if key[0] in inputs else lengths[key]
        take, index = _positions(sites, result.sources, key, length)
        indices.update({(*key, site): i for site, i in index.items()})
        if key[0] not in inputs:
            result.takes[key] = take
    for name, u in sites.items():
        slices = [replace(s, index=indices.get((s.tensor, s.dim, name), s.index)) for s in u.slices]
        result.consumed.update((s.tensor, s.dim) for s in slices if s.consumed)
        result.groups.update({s.tensor: s.group for s in slices if s.group})
        size = len(result.sources.get(name, range(u.size)))
        result.shifts += [(width, size - u.size) for width in u.widths if size != u.size]
        if isinstance(u, InputUnits):
            planned = result.units[name]
            assert isinstance(planned, InputUnits)
            u = replace(u, features=planned.features, full=planned.full)
        result.units[name] = replace(u, size=size, slices=slices)
    return result


def _checked(sites: Mapping[str, Units], name: str, sources: object) -> np.ndarray:
    if name not in sites:
        raise PlasticError(f"there is no site {name!r}; the sites are: {', '.join(sites)}")
    u = sites[name]
    if isinstance(u, BlockUnits):
        raise PlasticError(f"site {name!r} holds whole blocks: their gates skip them, and compact removes them")
    array = np.asarray(list(sources) if isinstance(sources, Iterable) else [sources]).reshape(-1)
    if len(array) and not np.issubdtype(array.dtype, np.integer):
        raise PlasticError(f"site {name!r}: source indices are integers, not {array.dtype}")
    array = array.astype(np.int64)
    kept = array[array >= 0]
    if len(array) == 0:
        raise PlasticError(f"site {name!r}: all {u.size} units would be removed; keep at least one")
    if (array < -1).any() or (kept >= u.size).any():
        raise PlasticError(f"site {name!r} has {u.size} units; indices must be 0 to {u.size - 1}, or -1 for a new unit")
    if (np.diff(kept) <= 0).any():
        raise PlasticError(f"site {name!r}: the kept units must be named once each, in increasing order")
    if not u.growable and (array < 0).any():
        raise PlasticError(
            f"site {name!r} can lose units but not gain any: new ones would come to lie in the wrong place, or count "
            "in the statistics of a norm"
        )
    if isinstance(u, InputUnits) and len(array) > u.full:
        raise PlasticError(f"site {name!r} has {u.full} features in all; {len(array)} were asked for")
    return array


def _positions(
    sites: Mapping[str, Units], sources: Mapping[str, np.ndarray], key: tuple[str, int], length: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The old positions that make up one dimension, and the units' new positions in it.

    Kept positions stay in order; a new unit's stretch follows that of the unit before it in the
    list (or comes before the first one).
    """
    here = [(n, s) for n, u in sites.items() for s in u.slices if (s.tensor, s.dim) == key]
    alive = np.ones(length, dtype=bool)
    added: list[tuple[float, int, int, str, int, int]] = []  # anchor, place in list, slot, site, unit, column
    for name, s in here:
        if name not in sources:
            continue
        source = sources[name]
        gone = np.setdiff1d(np.arange(len(s.index)), source)
        alive[s.index[gone].reshape(-1)] = False
        column = 0
        for run in s.runs:
            anchor = float(s.index[0, column]) - 0.5
            for place, unit in enumerate(source):
                if unit >= 0:
                    anchor = float(s.index[unit, column + run - 1])
                else:
                    added += [(anchor, place, c, name, place, column + c) for c in range(run)]
            column += run
    old = np.flatnonzero(alive)
    added.sort(key=lambda entry: entry[:4])
    # Stable: at equal anchors the kept position comes first, then the added ones in order.
    keys = np.concatenate([old.astype(float), np.array([a[0] for a in added])])
    order = np.argsort(keys, kind="stable")
    take = np.where(order < len(old), old[np.minimum(order, max(len(old) - 1, 0))] if len(old) else -1, -1)
    where = np.empty(len(order), dtype=np.int64)
    where[order] = np.arange(len(order))
    new_of_old = np.full(length, -1, dtype=np.int64)
    new_of_old[old] = where[: len(old)]
    index: dict[str, np.ndarray] = {}
    for name, s in here:
        source = sources.get(name, np.arange(len(s.index)))
        result = np.full((len(source), s.index.shape[1]), -1, dtype=np.int64)
        kept = np.flatnonzero(source >= 0)
        result[kept] = new_of_old[s.index[source[kept]]]
        index[name] = result
    for i, (_, _, _, name, unit, column) in enumerate(added):
        index[name][unit, column] = where[len(old) + i]
    return take, index


def _plan_features(u: InputUnits, full_take: np.ndarray, result: Plan) -> None:
    """An input site follows its producers: features of a cut channel go, those of a new one come
    open, and a -1 re-opens a closed feature (at random)."""
    asked = result.sources.get(u.name)
    changed = len(full_take) != u.full or (full_take != np.arange(u.full)).any()
    if asked is None and not changed:
        result.units[u.name] = u
        return
    asked = np.arange(u.size) if asked is None else asked
    column_of = np.full(u.full, -1, dtype=np.int64)
    column_of[u.features[asked[asked >= 0]]] = asked[asked >= 0]
    column = np.where(full_take >= 0, column_of[full_take], -1)
    present = (column >= 0) | (full_take < 0)
    was_closed = np.setdiff1d(np.arange(u.full), u.features)
    closed = np.flatnonzero(np.isin(full_take, was_closed))
    wake = int((asked < 0).sum())
    if wake > len(closed):
        raise PlasticError(
            f"site {u.name!r}: {wake} closed features were to be re-opened, but only {len(closed)} are closed"
        )
    if wake:
        present[closed[torch.randperm(len(closed))[:wake].numpy()]] = True
    if not present.any():
        raise PlasticError(
            f"site {u.name!r}: all features would be removed with the units that produce them; keep at least one"
        )
    result.units[u.name] = InputUnits(u.name, 0, [], features=np.flatnonzero(present), full=len(full_take))
    result.sources[u.name] = column[present]


# -- applying ---------------------------------------------------------------------------------


def apply(
    model: nn.Module,
    plan: Plan,
    gates: Mapping[str, tuple[nn.Parameter, float]],
    optimizers: Sequence[Optimizer] = (),
    init: str = "preserve",
) -> dict[nn.Parameter, nn.Parameter]:
    """Rewrite the model's tensors, the gate logits and the optimizers' state by a plan.

    ``gates`` maps a site to its logits and the value for new ones. ``init`` is "preserve" (random
    incoming and zero outgoing weights: the function stays) or "random" (both random). Returns old
    parameters with the new ones; both the model and the optimizers hold only the new ones. The gate
    logits are returned, not rebound in the model.

    Raises `PlasticError`, before anything changes, when the optimizers do not hold every trainable
    parameter or keep state that cannot be sliced.
    """
    if init not in INITS:
        raise PlasticError(f"init={init!r}: choose one of {', '.join(INITS)}")
    parameters = dict(model.named_parameters())
    check_optimizers(optimizers, {**parameters, **{f"the gates of {n}": p for n, (p, _) in gates.items()}})
    by_tensor: dict[str, dict[int, np.ndarray]] = {}
    for (tensor, dim), take in plan.takes.items():
        by_tensor.setdefault(tensor, {})[dim] = take
    moved: dict[nn.Parameter, nn.Parameter] = {}
    takes_of: dict[nn.Parameter, dict[int, np.ndarray]] = {}
    buffers = dict(model.named_buffers())
    cut_buffers: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, takes in by_tensor.items():
            old = parameters[name] if name in parameters else buffers[name]
            new = rewrite(old, takes)
            _initialise(model, name, new, takes, plan.consumed, init)
            if isinstance(old, nn.Parameter):
                moved[old] = nn.Parameter(new, requires_grad=old.requires_grad)
                takes_of[old] = takes
            else:
                cut_buffers.append((old, new))
        for site, (logits, value) in gates.items():
            if site in plan.sources:
                take = plan.sources[site]
                new = rewrite(logits, {0: take})
                new[torch.from_numpy(take < 0).to(new.device)] = value
                moved[logits] = nn.Parameter(new, requires_grad=logits.requires_grad)
                takes_of[logits] = {0: take}
        for old, new in moved.items():
            if old.grad is not None:
                new.grad = rewrite(old.grad, takes_of[old])
        replace_tensors(model, [*cut_buffers, *moved.items()])
        for optimizer in optimizers:
            rebind(optimizer, moved, lambda old, value, mean: rewrite(value, takes_of[old], mean))
    shift_widths(model, plan.shifts)
    update_attributes(model, plan.takes, plan.groups)
    return moved


def rewrite(tensor: Tensor, takes: Mapping[int, np.ndarray], mean: bool = False) -> Tensor:
    """A copy with each dimension made of the old positions in ``takes``; where they are -1, of zeros or
    of the mean over the kept ones."""
    new = tensor.detach()
    for dim, take in takes.items():
        old, index = new, torch.from_numpy(np.maximum(take, 0)).to(new.device)
        shape = [len(take) if d == dim else n for d, n in enumerate(old.shape)]
        new = old.index_select(dim, index) if old.shape[dim] else old.new_zeros(shape)
        fresh = torch.from_numpy(np.flatnonzero(take < 0)).to(new.device)
        if mean and len(fresh) < len(take):
            shape[dim] = len(fresh)
            kept = old.index_select(dim, index[torch.from_numpy(take >= 0).to(new.device)])
            new.index_copy_(dim, fresh, kept.mean(dim, keepdim=True).expand(shape))
        elif len(fresh):
            new.index_fill_(dim, fresh, 0)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format, tensor.dim())
        if rank == tensor.dim() and tensor.is_contiguous(memory_format=memory_format):
            return new.clone(memory_format=memory_format)
    return new.contiguous()


def _initialise(
    model: nn.Module, name: str, new: Tensor, takes: Mapping[int, np.ndarray], consumed: set[tuple[str, int]], init: str
) -> None:
    """Give the new entries of a rewritten tensor their values (they are zero)."""
    for dim, take in takes.items():
        fresh = torch.from_numpy(np.flatnonzero(take < 0)).to(new.device)
        if len(fresh) == 0 or ((name, dim) in consumed and init == "preserve"):
            continue
        if new.dim() > 1 and (new.is_floating_point() or new.is_complex()):
            bound = (new.shape[dim] / max(new.numel(), 1)) ** 0.5  # 1 / sqrt(fan in), as torch's layers
            if (name, dim) in consumed:
                bound = (new.shape[0] / max(new.numel(), 1)) ** 0.5
            added = torch.empty_like(new.index_select(dim, fresh), memory_format=torch.contiguous_format)
            (torch.view_as_real(added) if new.is_complex() else added).uniform_(-bound, bound)
            new.index_copy_(dim, fresh, added)
        else:
            new.index_fill_(dim, fresh, _vector_value(model, name, new, take))


def _vector_value(model: nn.Module, name: str, new: Tensor, take: np.ndarray) -> float:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
    if leaf in ("bias", "running_mean"):
        return 0.0
    if leaf == "running_var" or (norm and leaf == "weight"):
        return 1.0
    kept = new[torch.from_numpy(take >= 0).to(new.device)] if new.dim() == 1 else new
    return kept.to(torch.complex128 if new.is_complex() else torch.float64).mean().item() if kept.numel() else 0.0


def replace_tensors(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put the second tensor of each pair wherever the model holds the first (shared parameters have
    several places)."""
    held = [(old, new) for old, new in pairs]  # the ids below are those of living tensors
    new_of = {id(old): new for old, new in held}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                if id(value) in new_of:
                    store[key] = new_of[id(value)]  # pyright: ignore[reportArgumentType]
        if isinstance(module, nn.RNNBase):
            own: list[Any] = module._flat_weights  # a second list of the same parameters
            module._flat_weights = [new_of.get(id(w), w) for w in own]
