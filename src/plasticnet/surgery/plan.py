"""Works out what a resize does to every dimension of every tensor, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.units import BlockUnits, ExpertUnits, InputUnits, Slice, Units, Width

Sources = Mapping[str, Sequence[int]]  # for each site the old units that stay, in order, and -1 for a new one


def lengths(model: nn.Module) -> dict[tuple[str, int], int]:
    """Return the size of every dimension of every parameter and buffer, by the name of the tensor and the dimension."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {(name, d): n for name, t in tensors for d, n in enumerate(t.shape)}


@dataclass
class Plan:
    """What a resize does.

    Args:
        takes: For each dimension (tensor, dim) that changes, the old positions that make it up; -1 is a new one.
        sources: For each site that changes, the old units that make it up; -1 is a new one.
        units: The sites as they will be.
        consumed: The dimensions over which a contraction sums.
        groups: For weights of grouped layers, the number of rows in one group.
        lengths: For each direction of a weight_norm, its length, as in `Slice`.
        shifts: Attributes of modules, each with the number of units that its site gains.
    """

    takes: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    sources: dict[str, np.ndarray] = field(default_factory=dict)
    units: dict[str, Units] = field(default_factory=dict)
    consumed: set[tuple[str, int]] = field(default_factory=set)
    groups: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, tuple[str, int]] = field(default_factory=dict)
    shifts: list[tuple[Width, int]] = field(default_factory=list)


def plan_resize(sites: Mapping[str, Units], lengths: Mapping[tuple[str, int], int], sources: Sources) -> Plan:
    """Check the sources of a resize, and work out the new positions.

    Args:
        sites: All sites of the model.
        lengths: The size of every dimension, as `lengths` returns it.
        sources: For each site that changes, the old units that stay, in order, and -1 for a new one.

    Raises:
        PlasticError: A site is unknown or consists of blocks; an index is out of range or out of order; a site would be
            left without units; a site cannot grow; or an input site does not have so many features.
    """
    result = Plan(sources={name: _checked(sites, name, s) for name, s in sources.items()})
    inputs = {name: u for name, u in sites.items() if isinstance(u, InputUnits)}
    owners: dict[tuple[str, int], list[tuple[str, Slice]]] = {}
    for name, u in sites.items():
        for s in u.slices:
            owners.setdefault((s.tensor, s.dim), []).append((name, s))
    for name, u in inputs.items():
        full_take, _ = positions(owners.get((name, 0), []), result.sources, u.full)
        _plan_features(u, full_take, result)
    touched = {(s.tensor, s.dim) for name in result.sources for s in sites[name].slices}
    indices: dict[tuple[str, int, str], np.ndarray] = {}
    # Most tensors of a site are alike, so that results can be used again.
    known: dict[object, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
    for key in sorted(touched):
        length = inputs[key[0]].full if key[0] in inputs else lengths[key]
        alike = (length, *((name, s.runs, s.index.tobytes()) for name, s in owners[key]))
        if alike not in known:
            known[alike] = positions(owners[key], result.sources, length)
        take, index = known[alike]
        indices.update({(*key, site): i for site, i in index.items()})
        if key[0] not in inputs:
            result.takes[key] = take
    for name, u in sites.items():
        slices = [replace(s, index=indices.get((s.tensor, s.dim, name), s.index)) for s in u.slices]
        result.consumed.update((s.tensor, s.dim) for s in slices if s.consumed)
        result.groups.update({s.tensor: s.group for s in slices if s.group})
        result.lengths.update({s.tensor: s.length for s in slices if s.length and s.virtual is None})
        size = len(result.sources.get(name, range(u.size)))
        result.shifts += [(width, size - u.size) for width in u.widths if size != u.size]
        if isinstance(u, InputUnits):
            planned = result.units[name]
            assert isinstance(planned, InputUnits)
            u = replace(u, features=planned.features, full=planned.full)
        result.units[name] = replace(u, size=size, slices=slices)
    return result


def _checked(sites: Mapping[str, Units], name: str, sources: object) -> np.ndarray:
    """Return the sources of one site as an array, or raise `PlasticError` as `plan_resize` does."""
    if name not in sites:
        raise PlasticError(f"there is no site {name!r}; the sites are: {', '.join(sites)}")
    u = sites[name]
    if isinstance(u, ExpertUnits):
        raise PlasticError(f"site {name!r} holds whole experts: a closed one is not chosen, and compact removes it")
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


def positions(
    owners: Sequence[tuple[str, Slice]], sources: Mapping[str, np.ndarray], length: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the old positions that make up one dimension, and the new positions of the units in it.

    Kept positions stay in order. The positions of a new unit follow those of the unit before it in the list, or precede
    those of the first unit.

    Args:
        owners: The names of the sites that lie along the dimension, with their slices.
        sources: For each site that changes, the old units that make it up, as in `Plan`.
        length: The old length of the dimension.

    Returns:
        The old positions, shape (new length,), with -1 for new ones; and the new positions of every owner's units, by
        site, shape (units, width).
    """
    alive = np.ones(length, dtype=bool)
    added: list[np.ndarray] = []
    for s, source in [(s, sources[name]) for name, s in owners if name in sources]:
        alive[np.delete(s.index, source[source >= 0], axis=0)] = False
        added.append(_anchors(s, source).reshape(-1))
    old = np.flatnonzero(alive)
    # The sort is stable: at equal anchors the kept position comes first, and then the added ones in their order.
    order = np.argsort(np.concatenate([old, *added]), kind="stable")
    take = np.append(old, np.full(len(order) - len(old), -1))[order]
    where = np.argsort(order)  # the inverse of the order
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
    """Return, for every position of every new unit, the old position that it follows: shape (new units, width)."""
    before = np.maximum.accumulate(source)[source < 0]  # the kept unit before each new one, or -1
    ends = np.cumsum(s.runs, dtype=np.int64)
    first = s.index[0, np.append(0, ends[:-1])] - 0.5
    anchors = np.where(before[:, None] < 0, first, s.index[before][:, ends - 1])
    return np.repeat(anchors, s.runs, axis=1)


def _plan_features(u: InputUnits, full_take: np.ndarray, result: Plan) -> None:
    """Add to a plan how an input site follows its producers.

    Features of a channel that is cut go, and features of a new channel come open. A source of -1 re-opens a closed
    feature at random.

    Args:
        u: The input site.
        full_take: The old positions that make up its full axis; -1 is a new one.
        result: The plan, which is changed in place.

    Raises:
        PlasticError: More features would be re-opened than are closed, or none would be left.
    """
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
