"""Labels the axes of tensors: a label says which slice of a parameter an index belongs to.

An axis is a tuple of factors, outermost first, as in the notation ``(c h w)`` of einops. Flattening puts factors
together and un-flattening takes them apart, so that nothing is lost in between. A factor may be the batch. If not, it
may carry one integer label for each index.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import numpy as np

from plasticnet.units import owner


class Mark(Enum):
    """What a factor without labels is."""

    NONE = "none"  # its indices belong to no unit, so nothing can be cut there
    BATCH = "batch"  # its indices are the samples
    SAME = "same"  # all entries along it are equal (as in zeros, or after ``expand``), so any subset of them will do


@dataclass(frozen=True, eq=False)
class Grid:
    """The labels of one axis, which may be split over several factors.

    Attributes:
        labels: An array with one dimension for each factor.
    """

    labels: np.ndarray

    @cached_property
    def known(self) -> np.ndarray:
        """The labels that are not -1, each once and in ascending order."""
        return np.unique(self.labels[self.labels >= 0])


@dataclass(frozen=True, eq=False)
class Factor:
    """A factor of an axis.

    Attributes:
        size: The number of its indices.
        mark: What it is, where it has no labels.
        grid: Its labels, which it may share with other factors.
        part: The dimension of the grid that its indices run along.
    """

    size: int
    mark: Mark = Mark.NONE
    grid: Grid | None = None
    part: int = 0

    @property
    def is_split(self) -> bool:
        """Whether this factor shares its labels with others."""
        return self.grid is not None and self.grid.labels.ndim > 1


Axis = tuple[Factor, ...]
Levers = frozenset[tuple[str, int]]  # dimensions of parameters: the name of the tensor, and the dimension
NO_LEVERS: Levers = frozenset()


def plain(size: int, mark: Mark = Mark.NONE) -> Axis:
    """Return an axis of this length without labels."""
    return (Factor(size, mark),)


def labelled(labels: np.ndarray) -> Axis:
    """Return an axis with the given labels, one for each index, where -1 stands for no label."""
    labels = np.asarray(labels, dtype=np.int64)
    if (labels < 0).all():
        return plain(len(labels))
    return (Factor(len(labels), Mark.NONE, Grid(labels)),)


def split_labels(labels: np.ndarray) -> list[Factor]:
    """Return factors for an array of labels that has one dimension for each of them.

    A factor along which the labels do not change carries none.
    """
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
    """Return the length of an axis."""
    return prod(f.size for f in axis)


def is_batch(axis: Axis) -> bool:
    """Return whether the indices of this axis are the samples, one to one."""
    return len(axis) == 1 and axis[0].mark is Mark.BATCH


def is_same(axis: Axis) -> bool:
    """Return whether all entries along this axis are equal by construction."""
    return bool(axis) and all(f.mark is Mark.SAME for f in axis)


def has_labels(axis: Axis) -> bool:
    """Return whether any factor of this axis carries labels."""
    return any(f.grid is not None for f in axis)


@dataclass(frozen=True, eq=False)
class Tag:
    """The axes of one tensor, with their labels.

    Attributes:
        axes: The axes.
        levers: For each axis, the dimensions of parameters at which a gate can act on the tensor: where it multiplies
            what its unit owns in all of them, the entries of the unit here are zero if the gate is. Empty where no gate
            can act. The levers of a parameter are its own dimensions. No levers at all are the same as empty ones.
        static: Whether the tensor is computed from parameters and buffers alone, as the weights of layers are.
        blank: Whether the tensor was made with equal entries, or with none, and may be written to.
    """

    axes: tuple[Axis, ...]
    levers: tuple[Levers, ...] = ()
    static: bool = False
    blank: bool = False

    def with_axis(self, index: int, axis: Axis) -> Tag:
        """Return a tag with one axis replaced, without levers."""
        axes = list(self.axes)
        axes[index] = axis
        return Tag(tuple(axes))

    def levers_of(self, axis: int) -> Levers:
        """Return the levers of one axis, which may be counted from the end."""
        return self.levers[axis] if self.levers else NO_LEVERS

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(axis_size(a) for a in self.axes)

    @property
    def labelled(self) -> bool:
        """Whether any axis carries labels."""
        return any(has_labels(a) for a in self.axes)


class Ledger:
    """What tracing has learned: which labels are joined with one another, and which are frozen, with a reason.

    Attributes:
        total: How many labels there are.
        pairs: Pairs of arrays of labels that are joined entry by entry.
        frozen: Arrays of labels that are frozen, each with the reason.
        positional: Whether the model tells units apart by their position, as ``x[:, :3]`` does.
        head_dims: Name patterns of modules in whose heads the dimensions are the units, and not the heads.
    """

    def __init__(self) -> None:
        self.head_dims: tuple[str, ...] = ()
        self._dimensions: set[int] = set()  # the labels of dimensions that all heads have in common by now
        self._origins: list[tuple[int, str, int, int]] = []  # the first label, the tensor, the dimension, its length
        self._names: dict[tuple[str, int], tuple[int, int]] = {}
        self._free: list[int] = []  # the first of each group of labels that belongs to no tensor
        self.total = 0
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, str]] = []
        self.positional = False

    def fresh(self, tensor: str, dim: int, size: int) -> np.ndarray:
        """Return the labels of one dimension of a tensor; they are made when it is first asked for.

        Args:
            tensor: The name of the tensor.
            dim: The dimension.
            size: Its length.
        """
        if (tensor, dim) not in self._names:
            self._names[tensor, dim] = (self.total, size)
            self._origins.append((self.total, tensor, dim, size))
            self.total += size
        start, size = self._names[tensor, dim]
        return np.arange(start, start + size)

    def free(self, size: int) -> np.ndarray:
        """Return new labels for equal entries that may turn out to be units, such as a first hidden state of zeros.

        They belong to no tensor that could be cut: if they were joined with units, the model must make as many entries
        as there are units, which the self-check finds out.
        """
        self._free.append(self.total)
        return self.fresh(f"free {len(self._free)}", 0, size)

    def are_free(self, labels: np.ndarray) -> np.ndarray:
        """Return for each label whether `free` made it."""
        starts = np.array([start for start, *_ in self._origins])
        places = np.searchsorted(starts, labels, side="right") - 1
        return (labels >= 0) & np.isin(starts[places], self._free)

    def origins(self) -> Iterable[tuple[str, int, np.ndarray]]:
        """Yield the name of the tensor, the dimension and the labels of all that were made, in order."""
        for start, tensor, dim, size in self._origins:
            yield tensor, dim, np.arange(start, start + size)

    def origin(self, label: int) -> tuple[str, int]:
        """Return the tensor and the dimension that a label was made for."""
        starts = [start for start, *_ in self._origins]
        _, tensor, dim, _ = self._origins[bisect_right(starts, label) - 1]
        return tensor, dim

    def origins_of(self, labels: np.ndarray) -> list[tuple[str, int]]:
        """Return the tensors and the dimensions that some labels were made for, each once; -1 is ignored."""
        starts = np.array([start for start, *_ in self._origins])
        found = np.unique(np.searchsorted(starts, labels[labels >= 0], side="right") - 1)
        return [(self._origins[i][1], self._origins[i][2]) for i in found.tolist()]

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join the labels at equal places, so that they live and die together; -1 in either array is ignored."""
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self.pairs.append((a[both], b[both]))

    def are_joined(self, labels: np.ndarray) -> bool:
        """Return whether any of these labels was joined with others so far."""
        return any(np.isin(labels, np.concatenate(pair)).any() for pair in self.pairs)

    def join_all(self, labels: np.ndarray) -> None:
        """Join all these labels, so that they live and die together; -1 is ignored."""
        labels = labels[labels >= 0]
        if len(labels) > 1:
            self.pairs.append((labels[:-1], labels[1:]))

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """Note that these labels can never be cut, because of ``reason``; -1 is ignored."""
        labels = np.unique(labels[labels >= 0])
        if len(labels):
            self.frozen.append((labels, reason))

    def by_dimension(self, labels: np.ndarray) -> bool:
        """Return whether the units of these labels are dimensions of heads, as the user asks by ``head_dims``."""
        if not self.head_dims:
            return False
        paths = [owner(tensor).split(".") for tensor, _ in self.origins_of(labels)]
        names = {".".join(path[: n + 1]) for path in paths for n in range(len(path))}
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.head_dims)

    def _share_dimensions(self, labels: np.ndarray) -> np.ndarray | None:
        """Join the dimensions at equal places of all heads, and return one label for each.

        Returns:
            None where the labels are not those of heads whose dimensions are the units. What takes the dimensions of
            a head apart, such as the pairs of a rotary embedding, is treated as anywhere else.
        """
        if not self.by_dimension(labels) or self._dimensions.issuperset(labels.reshape(-1).tolist()):
            return None
        heads = labels.reshape(-1, labels.shape[-1])
        for column in heads.T:
            self.join_all(column)
        self._dimensions.update(heads[0].tolist())
        return heads[0]

    # -- reading axes -----------------------------------------------------------------------

    def settle(self, tag: Tag) -> Tag:
        """Decide what split labels mean, when something other than layout reads them.

        Parts that came back together in another order are a channel shuffle: the outer factor stays constant, and its
        groups lose the same members. Parts that are still on several axes are heads: one unit is a whole slice of the
        outermost factor, or of the second one where the first was taken apart before. Where ``head_dims`` says so, one
        unit is a dimension of all heads.

        Returns:
            The same axes without factors that share their labels.
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
            part, units = grid.labels.ndim - 1, self._share_dimensions(grid.labels)
            if units is None:
                for row in grid.labels:
                    self.join_all(row.reshape(-1))
                part, units = 0, grid.labels.reshape(grid.labels.shape[0], -1)[:, 0]
            for i, j in where:
                f = axes[i][j]
                axes[i][j] = labelled(units)[0] if f.part == part else Factor(f.size)
        return Tag(tuple(tuple(a) for a in axes), tag.levers, tag.static)

    def read(self, tag: Tag, axis: int) -> np.ndarray:
        """Return one label for each index of an axis, where -1 stands for none.

        Where several factors of the axis have labels, only the innermost keeps them and the others are frozen, because
        an index has one label; those of length 1 do not count.
        """
        factors = self.settle(tag).axes[axis]
        size = axis_size(factors)
        found = np.full(size, -1, dtype=np.int64)
        seen = False
        for i, f in enumerate(factors):
            if f.grid is None:
                continue
            if f.size == 1 and any(other.grid is not None and other.size > 1 for other in factors):
                self.freeze(f.grid.labels.reshape(-1), "a single channel is flattened into an axis")
                continue
            outer, inner = axis_size(factors[:i]), axis_size(factors[i + 1 :])
            spread = np.tile(np.repeat(f.grid.labels, inner), outer)
            if seen and self.are_free(spread[spread >= 0]).all():
                self.freeze(spread, "two gated axes are flattened into one")
                continue
            self.freeze(found, "two gated axes are flattened into one")
            found, seen = spread, True
        return found
