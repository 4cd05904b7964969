"""Labels on tensor axes: which index belongs to which parameter slice.

An axis is a tuple of factors, outermost first, as in the einops notation ``(c h w)``: flattening
puts factors together, un-flattening takes them apart, and nothing is lost on the way. A factor is
the batch, or carries one integer label per index, or neither.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import prod

import numpy as np


class Mark(Enum):
    """What an unlabelled factor is."""

    NONE = "none"  # indices of no unit: nothing to cut there
    BATCH = "batch"
    SAME = "same"  # equal entries along it (an expanded axis, zeros): any subset will do


@dataclass(frozen=True, eq=False)
class Grid:
    """Labels of one axis, split over several factors: ``labels`` has one dimension per factor."""

    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Factor:
    """``size`` indices of an axis; ``part`` is the dimension of ``grid`` that they run along."""

    size: int
    mark: Mark = Mark.NONE
    grid: Grid | None = None
    part: int = 0

    @property
    def is_split(self) -> bool:
        """Whether this factor is one of several that share their labels."""
        return self.grid is not None and self.grid.labels.ndim > 1


Axis = tuple[Factor, ...]


def plain(size: int, mark: Mark = Mark.NONE) -> Axis:
    """An axis without labels."""
    return (Factor(size, mark),)


def labelled(labels: np.ndarray) -> Axis:
    """An axis with one label per index, -1 for none."""
    labels = np.asarray(labels, dtype=np.int64)
    if (labels < 0).all():
        return plain(len(labels))
    return (Factor(len(labels), Mark.NONE, Grid(labels)),)


def split_labels(labels: np.ndarray) -> list[Factor]:
    """Factors for an array of labels with one dimension per factor, dropping where nothing varies."""
    kept = [d for d in range(labels.ndim) if (labels != labels.take([0], d)).any()]
    if not kept and (labels >= 0).all():
        kept = [0]
    grid = Grid(labels[tuple(slice(None) if d in kept else 0 for d in range(labels.ndim))])
    if not kept:
        return [Factor(size) for size in labels.shape]
    return [
        Factor(size, Mark.NONE, grid, kept.index(d)) if d in kept else Factor(size)
        for d, size in enumerate(labels.shape)
    ]


def axis_size(axis: Axis) -> int:
    """The length of an axis."""
    return prod(f.size for f in axis)


def is_batch(axis: Axis) -> bool:
    """Whether the rows of this axis are the samples, one to one."""
    return len(axis) == 1 and axis[0].mark is Mark.BATCH


def is_same(axis: Axis) -> bool:
    """Whether all entries along this axis are equal by construction."""
    return bool(axis) and all(f.mark is Mark.SAME for f in axis)


def has_labels(axis: Axis) -> bool:
    """Whether any index of this axis belongs to a unit."""
    return any(f.grid is not None for f in axis)


@dataclass(frozen=True, eq=False)
class Tag:
    """The axes of one tensor. ``source`` names the parameter that it is a plain view of, and
    ``dims`` says which of the parameter's dimensions each axis is. A ``blank`` tensor was made with equal
    entries, or none, to be written to."""

    axes: tuple[Axis, ...]
    source: str | None = None
    dims: tuple[int, ...] = ()
    blank: bool = False

    def with_axis(self, index: int, axis: Axis) -> Tag:
        """A copy with one axis replaced."""
        axes = list(self.axes)
        axes[index] = axis
        return Tag(tuple(axes))

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(axis_size(a) for a in self.axes)

    @property
    def labelled(self) -> bool:
        """Whether any axis carries labels."""
        return any(has_labels(a) for a in self.axes)


class Ledger:
    """What was learned: labels joined to one another, and labels frozen with a reason."""

    def __init__(self) -> None:
        self._origins: list[tuple[int, str, int, int]] = []  # first label, tensor, dim, size
        self._names: dict[tuple[str, int], tuple[int, int]] = {}
        self.total = 0
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, str]] = []
        self.positional = False  # whether units are told apart by position, as by x[:, :3]

    def fresh(self, tensor: str, dim: int, size: int) -> np.ndarray:
        """New labels for one dimension of a tensor (the same ones when asked again)."""
        if (tensor, dim) not in self._names:
            self._names[tensor, dim] = (self.total, size)
            self._origins.append((self.total, tensor, dim, size))
            self.total += size
        start, size = self._names[tensor, dim]
        return np.arange(start, start + size)

    def origins(self) -> Iterable[tuple[str, int, np.ndarray]]:
        """Every (tensor, dim, labels) that was handed out, in order."""
        for start, tensor, dim, size in self._origins:
            yield tensor, dim, np.arange(start, start + size)

    def origin(self, label: int) -> tuple[str, int]:
        """The tensor and dimension that a label was handed out for."""
        starts = [start for start, *_ in self._origins]
        _, tensor, dim, _ = self._origins[bisect_right(starts, label) - 1]
        return tensor, dim

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """The labels at equal places live and die together; those without a partner are ignored."""
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self.pairs.append((a[both], b[both]))

    def join_all(self, labels: np.ndarray) -> None:
        """All these labels live and die together."""
        labels = labels[labels >= 0]
        if len(labels) > 1:
            self.pairs.append((labels[:-1], labels[1:]))

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """These labels can never be cut, because of ``reason``."""
        labels = np.unique(labels[labels >= 0])
        if len(labels):
            self.frozen.append((labels, reason))

    # -- reading axes -----------------------------------------------------------------------

    def settle(self, tag: Tag) -> Tag:
        """Decide what split labels mean, now that something other than layout reads them.

        Parts that came back together in another order are a channel shuffle: the outer factor is
        constant and its groups lose the same members. Parts left on several axes are heads: one
        unit is a whole slice of the outermost factor (or of the second one, when the first was
        taken apart before).
        """
        grids = {id(f.grid): f.grid for a in tag.axes for f in a if f.is_split and f.grid}
        axes = [list(a) for a in tag.axes]
        for grid in grids.values():
            where = [(i, j) for i, a in enumerate(axes) for j, f in enumerate(a) if f.grid is grid]
            first, last = where[0], where[-1]
            parts = [axes[i][j].part for i, j in where]
            whole = len(parts) == grid.labels.ndim
            if whole and first[0] == last[0] and last[1] - first[1] == len(parts) - 1:
                if parts != sorted(parts):
                    for column in grid.labels.reshape(grid.labels.shape[0], -1).T:
                        self.join_all(column)
                flat = grid.labels.transpose(parts).reshape(-1)
                axes[first[0]][first[1] : last[1] + 1] = labelled(flat)
                continue
            for row in grid.labels:
                self.join_all(row.reshape(-1))
            heads = grid.labels.reshape(grid.labels.shape[0], -1)[:, 0]
            for i, j in where:
                f = axes[i][j]
                axes[i][j] = labelled(heads)[0] if f.part == 0 else Factor(f.size)
        return Tag(tuple(tuple(a) for a in axes), tag.source, tag.dims)

    def read(self, tag: Tag, axis: int) -> np.ndarray:
        """One label per index of an axis, -1 for none. Two labelled factors on one axis freeze."""
        factors = self.settle(tag).axes[axis]
        size = axis_size(factors)
        found = np.full(size, -1, dtype=np.int64)
        seen = False
        for i, f in enumerate(factors):
            if f.grid is None:
                continue
            outer, inner = axis_size(factors[:i]), axis_size(factors[i + 1 :])
            spread = np.tile(np.repeat(f.grid.labels, inner), outer)
            if seen:
                self.freeze(found, "two gated axes are flattened into one")
                self.freeze(spread, "two gated axes are flattened into one")
            found, seen = spread, True
        return found
