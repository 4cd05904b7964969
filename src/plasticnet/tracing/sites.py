"""Turns labels into sites: connected components of labels, grouped by the producer in which they are born."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from plasticnet.tracing.branches import freeze_for_other_branches
from plasticnet.tracing.counts import attach_counts
from plasticnet.tracing.facts import Facts
from plasticnet.tracing.labels import Ledger
from plasticnet.units import InputUnits, Slice, Trace, Units, owner

_EMBEDDING = "the features of an embedding; residual=True gates them"
_MAX_PIECES = 4  # where the units of a producer fall into more pieces than this, resizing cannot keep their order


@dataclass
class _Classes:
    """The classes of joined labels.

    Attributes:
        of: The class of each label.
        order: The labels that belong to a tensor, ordered by class.
        starts: Where each class begins in this order. A further entry says where the last class ends.
    """

    of: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    def members(self, c: int) -> np.ndarray:
        """Return the labels of a class that belong to a tensor, in ascending order."""
        return self.order[self.starts[c] : self.starts[c + 1]]


def build(facts: Facts, unseen: Sequence[str], refused: str | None = None) -> Trace:
    """Group the classes of joined labels into sites, and list what is frozen with the reason.

    Args:
        facts: What the runs of the model have found.
        unseen: The names of the parameters and buffers that no run has used.
        refused: Why the model does not run in training mode, or None.
    """
    ledger = facts.ledger
    origins = list(ledger.origins())
    origin_of = np.zeros(ledger.total, dtype=np.int64)
    starts = np.zeros(len(origins), dtype=np.int64)
    for i, (tensor, _, labels) in enumerate(origins):
        origin_of[labels] = i
        starts[i] = labels[0] if len(labels) else 0
        if tensor in unseen:
            ledger.freeze(labels, "never used while the model ran")
    names = [(tensor, dim) for tensor, dim, _ in origins]
    classes = _classes(ledger)
    if refused is not None:
        why = f"the model does not run in training mode ({refused})"
        freeze_for_other_branches(ledger, classes.of, unseen, why, "then")
    if facts.steered:
        freeze_for_other_branches(ledger, classes.of, unseen, "the model reads a value", "in another branch")
    for key in facts.merging & facts.contracted:
        del facts.producers[key]
    tables = {(table, 1) for table in facts.tables | facts.embeddings}
    for i, key in enumerate(names):
        if key in facts.producers and key in facts.contracted and key[0] not in facts.inputs and key not in tables:
            ledger.freeze(origins[i][2], "one tensor both produces and consumes the same units")
    for norm in facts.norms:
        if (norm.module, norm.axis, norm.statistic) in facts.means:
            labels = next(labels for t, d, labels in origins if (t, d) == (norm.tensor, norm.dim))
            ledger.freeze(labels, f"its layer also takes a {norm.statistic} over the same axis of something else")
    reasons = _frozen_classes(classes, ledger.frozen)

    trace = Trace({}, {}, dict(facts.uses))
    taken: set[int] = set()
    for key in _ordered(facts, names):
        if key[0] in facts.inputs:
            _input_site(key[0], facts, trace)
            continue
        labels = origins[names.index(key)][2]
        mine = [c for c in dict.fromkeys(classes.of[labels].tolist()) if c not in taken]
        taken.update(mine)
        if key[0] in facts.embeddings:
            reasons.update((c, reasons.get(c, _EMBEDDING)) for c in mine)
        name = owner(key[0]) or key[0]
        _sites_of(name, mine, classes, reasons, origin_of, starts, names, facts, trace)
    _attach_consumers(facts, trace)
    for units in trace.sites.values():
        places = {(s.tensor, s.dim) for s in units.slices}
        units.norms.extend(n for n in facts.norms if (n.tensor, n.dim) in places)
        units.growable = not units.norms and not places & facts.capped  # new units would count in the statistics
    attach_counts(facts, trace)
    return trace


def _ordered(facts: Facts, names: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return where units are born, in the order in which they were found.

    Where values decide which modules run, the order must not depend on values, because the gates are numbered by it. It
    is then that of the parameters in the model, and the input axes come last.
    """
    found = [key for key in facts.producers if key in names]  # a dimension of length 0 has no labels
    if not facts.routed:
        return found
    return sorted(found, key=lambda key: (key[0] in facts.inputs, names.index(key)))


def _classes(ledger: Ledger) -> _Classes:
    """Return the connected components of labels that are joined in pairs."""
    total, pairs = ledger.total, ledger.pairs
    a = np.concatenate([p[0] for p in pairs]) if pairs else np.zeros(0, dtype=np.int64)
    b = np.concatenate([p[1] for p in pairs]) if pairs else np.zeros(0, dtype=np.int64)
    graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(total, total))
    count, of = connected_components(graph, directed=False)
    order = np.argsort(of, kind="stable")
    order = order[~ledger.are_free(order)]
    return _Classes(of, order, np.searchsorted(of[order], np.arange(count + 1)))


def _frozen_classes(classes: _Classes, frozen: list[tuple[np.ndarray, str]]) -> dict[int, str]:
    """Return the classes with a frozen label, each with the first reason that was given."""
    reasons: dict[int, str] = {}
    for labels, reason in frozen:
        for c in np.unique(classes.of[labels]).tolist():
            reasons.setdefault(c, reason)
    return reasons


def _sites_of(
    name: str,
    mine: list[int],
    classes: _Classes,
    reasons: dict[int, str],
    origin_of: np.ndarray,
    starts: np.ndarray,
    names: list[tuple[str, int]],
    facts: Facts,
    trace: Trace,
) -> None:
    """Add to the trace the sites of the classes that are born in one producer, or the reasons why there are none.

    Args:
        name: The name of the producer.
        mine: The classes that are born in it.
        classes: All classes.
        reasons: Why a class is frozen.
        origin_of: For each label, the number of the dimension that it was made for.
        starts: For each of these dimensions, its first label.
        names: For each of these dimensions, the name of the tensor and the dimension.
        facts: What the runs of the model have found.
        trace: The trace to add to.
    """
    groups: dict[tuple[int, ...], list[np.ndarray]] = {}
    unread: dict[tuple[int, ...], bool] = {}  # for all units that lie in the same dimensions at once
    for c in mine:
        reason = reasons.get(c)
        members = classes.members(c)
        born_in = tuple(origin_of[members].tolist()) if reason is None else ()
        if reason is None:
            if born_in not in unread:
                unread[born_in] = not any(names[o] in facts.consumers or names[o][0] in facts.inputs for o in born_in)
            if unread[born_in]:
                reason = "nothing that can be cut reads it"
        if reason is not None:
            trace.frozen.setdefault(_free_name(name, trace, reason), reason)
        else:
            groups.setdefault(born_in, []).append(members)
    for born_in, members in groups.items():
        matrix = np.stack(members)  # the labels, shape (units, slots)
        cuts = _pieces(matrix)
        if len(cuts) - 1 > _MAX_PIECES:
            trace.frozen[_free_name(name, trace)] = "its units lie in an order that resizing cannot keep"
            continue
        for first, last in pairwise(cuts):
            part = matrix[first:last]
            slices = []
            for origin in dict.fromkeys(born_in):
                columns = [i for i, o in enumerate(born_in) if o == origin]
                index = part[:, columns] - starts[origin]
                reader = facts.inputs.get(names[origin][0])
                virtual = None if reader is None else (reader.tensor, reader.dim)
                consumed = names[origin] in facts.consumers or reader is not None
                group = facts.grouped.get(names[origin][0], 0) if names[origin][1] == 0 else 0
                length = _length(facts, *(names[origin] if virtual is None else virtual))
                slices.append(Slice(*names[origin], index, _runs(index), consumed, group, virtual, length))
            site = _free_name(name, trace)
            trace.sites[site] = Units(site, len(part), slices)


def _length(facts: Facts, tensor: str, dim: int) -> tuple[str, int] | None:
    """Return the length of a weight_norm that takes a norm over this dimension, as in `Slice`, or None."""
    length = facts.lengths.get(tensor)
    return None if length is None or length[1] == dim else length


def _free_name(name: str, trace: Trace, reason: str | None = None) -> str:
    """Return a free name for units of a producer: ``conv1``, or ``conv1#2`` where other units have that name."""
    candidate, n = name, 1
    while candidate in trace.sites or trace.frozen.get(candidate, reason) != reason:
        n += 1
        candidate = f"{name}#{n}"
    return candidate


def _pieces(matrix: np.ndarray) -> list[int]:
    """Return where to cut a list of units so that the units of each piece follow one another regularly.

    Args:
        matrix: The labels of the units, shape (units, slots).

    Returns:
        The bounds of the pieces, from 0 to the number of units.
    """
    steps = np.diff(matrix, axis=0)
    turns = np.flatnonzero((steps[1:] != steps[:-1]).any(1)) + 2  # units whose step is not that of the unit before
    cuts, first = [0], 0
    while first + 1 < len(matrix):
        if _is_regular(matrix[first], steps[first]):
            turn = np.searchsorted(turns, first + 2)
            first = int(turns[turn]) if turn < len(turns) else len(matrix)
        else:
            first += 1
        if first < len(matrix):
            cuts.append(first)
    return [*cuts, len(matrix)]


def _is_regular(unit: np.ndarray, step: np.ndarray) -> bool:
    """Return whether the next unit directly follows every stretch of this one.

    Args:
        unit: The labels of the unit, shape (slots,).
        step: The labels of the next unit less those of this one.
    """
    slot = 0
    while slot < len(unit):
        length = int(step[slot])
        stretch = slice(slot, slot + length)
        if length < 1 or slot + length > len(unit) or (step[stretch] != length).any():
            return False
        if (np.diff(unit[stretch]) != 1).any():
            return False
        slot += length
    return True


def _runs(index: np.ndarray) -> tuple[int, ...]:
    """Return the lengths of the stretches that stay contiguous within a unit.

    They follow from the step to the next unit, or from the gaps in the unit where there is a single one.

    Args:
        index: The positions that each unit owns, shape (units, width).
    """
    runs: list[int] = []
    slot = 0
    while slot < index.shape[1]:
        if len(index) > 1:
            length = int(index[1, slot] - index[0, slot])
        else:
            gaps = np.flatnonzero(np.diff(index[0, slot:]) != 1)
            length = int(gaps[0]) + 1 if len(gaps) else index.shape[1] - slot
        runs.append(length)
        slot += length
    return tuple(runs)


def _input_site(virtual: str, facts: Facts, trace: Trace) -> None:
    """Turn a virtual input axis into a site, unless its features are, one to one, the units of another site."""
    consumer = facts.inputs[virtual]
    owners = [(u, s) for u in trace.sites.values() for s in u.slices if s.tensor == virtual]
    full = next(len(labels) for tensor, _, labels in facts.ledger.origins() if tensor == virtual)
    if len(owners) == 1 and owners[0][1].index.shape == (full, 1):
        (_, columns) = owners[0]
        columns.tensor, columns.dim, columns.virtual = consumer.tensor, consumer.dim, None
        return
    length = _length(facts, consumer.tensor, consumer.dim)
    columns = Slice(consumer.tensor, consumer.dim, np.arange(full)[:, None], (1,), consumed=True, length=length)
    trace.sites[virtual] = InputUnits(virtual, full, [columns], [consumer], np.arange(full), full)


def _attach_consumers(facts: Facts, trace: Trace) -> None:
    """Give every site the consumers that read its units."""
    for units in trace.sites.values():
        read = {(s.tensor, s.dim) for s in units.slices}
        read |= {s.virtual for s in units.slices if s.virtual is not None}
        for key, consumers in facts.consumers.items():
            if key in read:
                units.consumers.extend(c for c in consumers if c not in units.consumers)
