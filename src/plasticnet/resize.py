"""Resize: the one operation for growth and pruning.

For each site a list of source indices: ``[0, 2, 3, -1, -1]`` keeps three units and adds two. A
`Plan` says, for every dimension of every tensor, which old positions make up the new ones (-1 for
new); `apply` rewrites parameters, buffers, module attributes and the optimizers' state by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plasticnet import distributed
from plasticnet.attributes import shift_widths, update_attributes
from plasticnet.errors import PlasticError
from plasticnet.gates import INITIAL_LOGIT, OPEN_LOGIT
from plasticnet.optimizers import check_optimizers, rebind
from plasticnet.units import BlockUnits, InputUnits, Slice, Units, Width

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet

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
    owners: dict[tuple[str, int], list[tuple[str, Slice]]] = {}
    for name, u in sites.items():
        for s in u.slices:
            owners.setdefault((s.tensor, s.dim), []).append((name, s))
    for name, u in inputs.items():
        full_take, _ = _positions(owners.get((name, 0), []), result.sources, u.full)
        _plan_features(u, full_take, result)
    touched = {(s.tensor, s.dim) for name in result.sources for s in sites[name].slices}
    indices: dict[tuple[str, int, str], np.ndarray] = {}
    known: dict[object, tuple[np.ndarray, dict[str, np.ndarray]]] = {}  # most tensors of a site are alike
    for key in sorted(touched):
        length = inputs[key[0]].full if key[0] in inputs else lengths[key]
        alike = (length, *((name, s.runs, s.index.tobytes()) for name, s in owners[key]))
        if alike not in known:
            known[alike] = _positions(owners[key], result.sources, length)
        take, index = known[alike]
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
    owners: Sequence[tuple[str, Slice]], sources: Mapping[str, np.ndarray], length: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The old positions that make up one dimension, and the new positions in it of its owners' units.

    Kept positions stay in order; a new unit's stretch follows that of the unit before it in the
    list (or comes before the first one).
    """
    alive = np.ones(length, dtype=bool)
    added: list[np.ndarray] = []
    for s, source in [(s, sources[name]) for name, s in owners if name in sources]:
        alive[np.delete(s.index, source[source >= 0], axis=0)] = False
        added.append(_anchors(s, source).reshape(-1))
    old = np.flatnonzero(alive)
    # Stable: at equal anchors the kept position comes first, then the added ones in order.
    order = np.argsort(np.concatenate([old, *added]), kind="stable")
    take = np.append(old, np.full(len(order) - len(old), -1))[order]
    where = np.argsort(order)  # its inverse
    new_of_old = np.full(length, -1)
    new_of_old[old], new = np.split(where, [len(old)])
    index: dict[str, np.ndarray] = {}
    for name, s in owners:
        source = sources.get(name, np.arange(len(s.index)))
        index[name] = new_of_old[s.index[source]]
        here = index[name][source < 0]
        index[name][source < 0] = new[: here.size].reshape(here.shape)
        new = new[here.size :]
    return take, index


def _anchors(s: Slice, source: np.ndarray) -> np.ndarray:
    """For every position of every new unit the old one that it follows: shape (new units, width)."""
    before = np.maximum.accumulate(source)[source < 0]  # the kept units increase; -1: there is none
    ends = np.cumsum(s.runs, dtype=np.int64)
    first = s.index[0, np.append(0, ends[:-1])] - 0.5
    anchors = np.where(before[:, None] < 0, first, s.index[before][:, ends - 1])
    return np.repeat(anchors, s.runs, axis=1)


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


def rebuild(
    net: PlasticNet,
    sources: Sources,
    lengths: Mapping[tuple[str, int], int],
    optimizers: Sequence[Optimizer],
    init: str,
    grace: int,
) -> None:
    """See `PlasticNet.resize`."""
    if not isinstance(sources, Mapping):
        raise PlasticError(f"resize takes a mapping of site to source indices, not a {type(sources).__name__}")
    opened = OPEN_LOGIT / net.k if 0 < net.k < math.inf else INITIAL_LOGIT
    logits = {s.name: (s.phi, 0.0 if init == "paper" else opened) for s in net._sites()}
    weights = {w.name: (w.phi, opened) for w in net._weights()}
    with distributed.alike(net):
        planned = plan({s.name: s.units for s in net._sites()}, lengths, sources)
        moved = apply(net.model, planned, logits, optimizers, init, weights)
    if moved:
        distributed.outgrow(net)
    for g in net._gated():
        g.phi = moved.get(g.phi, g.phi)
    for site in net._sites():
        if site.name in planned.sources:
            source = planned.sources[site.name]
            site.grace = rewrite(site.grace, {0: source})
            site.grace[torch.from_numpy(source < 0).to(site.grace.device)] = grace
    net._adopt(planned)


# -- applying ---------------------------------------------------------------------------------


def apply(
    model: nn.Module,
    plan: Plan,
    gates: Mapping[str, tuple[nn.Parameter, float]],
    optimizers: Sequence[Optimizer] = (),
    init: str = "preserve",
    weights: Mapping[str, tuple[nn.Parameter, float]] | None = None,
) -> dict[nn.Parameter, nn.Parameter]:
    """Rewrite the model's tensors, the gate logits and the optimizers' state by a plan.

    ``gates`` maps a site to its logits and the value for new ones, ``weights`` a parameter to the logits of its
    entries, which follow it, and the value. ``init`` is "preserve" (random
    incoming and zero outgoing weights: the function stays), "random" or "paper" (both random). Returns old
    parameters with the new ones; both the model and the optimizers hold only the new ones. The gate
    logits are returned, not rebound in the model.

    Raises `PlasticError`, before anything changes, when the optimizers do not hold every trainable
    parameter or keep state that cannot be sliced.
    """
    if init not in INITS:
        raise PlasticError(f"init={init!r}: choose one of {', '.join(INITS)}")
    parameters = dict(model.named_parameters())
    every = [*gates.items(), *(weights or {}).items()]
    check_optimizers(optimizers, {**parameters, **{f"the gates of {n}": p for n, (p, _) in every}})
    by_tensor: dict[str, dict[int, _Take]] = {}
    for (tensor, dim), take in plan.takes.items():
        by_tensor.setdefault(tensor, {})[dim] = _Take(take)
    moved: dict[nn.Parameter, nn.Parameter] = {}
    takes_of: dict[nn.Parameter, dict[int, _Take]] = {}
    buffers = dict(model.named_buffers())
    cut_buffers: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, takes in by_tensor.items():
            old = parameters[name] if name in parameters else buffers[name]
            new = _rewrite(old, takes)
            _initialise(model, name, new, takes, plan.consumed, init)
            if isinstance(old, nn.Parameter):
                moved[old] = nn.Parameter(new, requires_grad=old.requires_grad)
                takes_of[old] = takes
            else:
                cut_buffers.append((old, new))
        takes_of_gates = {site: {0: _Take(source)} for site, source in plan.sources.items()}
        followers = [(by_tensor.get(n), *g) for n, g in (weights or {}).items()]
        for takes, logits, value in [*((takes_of_gates.get(n), *g) for n, g in gates.items()), *followers]:
            if takes is not None:
                new = _rewrite(logits, takes)
                for dim, take in takes.items():
                    new[_at(dim, take.fresh)] = value
                moved[logits] = nn.Parameter(new, requires_grad=logits.requires_grad)
                takes_of[logits] = takes
        for old, new in moved.items():
            if old.grad is not None:
                new.grad = _rewrite(old.grad, takes_of[old])
        replace_tensors(model, [*cut_buffers, *moved.items()])
        for optimizer in optimizers:
            rebind(optimizer, moved, lambda old, value, mean: _rewrite(value, takes_of[old], mean))
    shift_widths(model, plan.shifts)
    update_attributes(model, plan.takes, plan.groups)
    return moved


def rewrite(tensor: Tensor, takes: Mapping[int, np.ndarray]) -> Tensor:
    """A copy with each dimension made of the old positions in ``takes``; where they are -1, of zeros."""
    return _rewrite(tensor, {dim: _Take(take) for dim, take in takes.items()})


class _Take:
    """How one dimension is rewritten: by slices where that will do, which are faster than indices.

    ``kept`` and ``fresh`` are the new positions. From the old ones ``source`` comes what fills ``target``:
    the kept positions where these are a slice, else all of them, for the fresh ones to be filled afterwards.
    """

    def __init__(self, take: np.ndarray) -> None:
        places = np.flatnonzero(take >= 0)
        self.length, self.empty, self.grows = len(take), len(places) == 0, len(places) < len(take)
        self.kept, self.fresh = _where(places), _where(np.flatnonzero(take < 0))
        self.target = self.kept if isinstance(self.kept, slice) else slice(None)
        self.source = _where(take[places] if isinstance(self.kept, slice) else np.maximum(take, 0))


def _where(positions: np.ndarray) -> slice | Tensor:
    if (np.diff(positions) == 1).all():
        first = int(positions[0]) if len(positions) else 0
        return slice(first, first + len(positions))
    return torch.from_numpy(positions)


def _part(tensor: Tensor, dim: int, where: slice | Tensor) -> Tensor:
    """What lies at these positions: a view of a slice, else a copy."""
    return tensor[_at(dim, where)] if isinstance(where, slice) else tensor.index_select(dim, where.to(tensor.device))


def _at(dim: int, where: slice | Tensor) -> tuple[slice | Tensor, ...]:
    return (*[slice(None)] * dim, where)


def _rewrite(tensor: Tensor, takes: Mapping[int, _Take], mean: bool = False) -> Tensor:
    """`rewrite`; with ``mean``, new entries are the mean over the kept ones."""
    new = tensor.detach()
    steps = [[item] for item in takes.items()]  # dimension 0 comes first: its rows are contiguous
    if all(isinstance(t.source, slice) and t.source == slice(0, new.shape[dim]) for dim, t in takes.items()):
        steps = [list(takes.items())]  # nothing is cut: all dimensions grow at once
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


def _fill(new: Tensor, kept: Tensor, takes: Sequence[tuple[int, _Take]], mean: bool) -> None:
    """Fill ``new``: with what is kept, then with what is new, one dimension after the other."""
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
    """Give the new entries of a rewritten tensor their values (they are zero)."""
    for dim, take in takes.items():
        if not take.grows or ((name, dim) in consumed and init == "preserve"):
            continue
        if new.dim() > 1 and (new.is_floating_point() or new.is_complex()):
            outputs = new.shape[0 if (name, dim) in consumed else dim]
            bound = (outputs / max(new.numel(), 1)) ** 0.5  # 1 / sqrt(fan in), as torch's layers
            added = torch.empty_like(_part(new, dim, take.fresh), memory_format=torch.contiguous_format)
            (torch.view_as_real(added) if new.is_complex() else added).uniform_(-bound, bound)
            new[_at(dim, take.fresh)] = added
        else:
            new[_at(dim, take.fresh)] = _vector_value(model, name, new, take)


def _vector_value(model: nn.Module, name: str, new: Tensor, take: _Take) -> float:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
    if leaf in ("bias", "running_mean"):
        return 0.0
    if leaf == "running_var" or (norm and leaf == "weight"):
        return 1.0
    kept = _part(new, 0, take.kept) if new.dim() == 1 else new
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
