"""Moves labels as reshaping does, and as cutting an axis into pieces does."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from plasticnet.tracing.labels import Axis, Factor, Ledger, Mark, Tag, labelled, plain, split_labels


def reshape(ledger: Ledger, tag: Tag, shape: Sequence[int]) -> Tag:
    """Return the labels of ``tensor.reshape(shape)``.

    Where a labelled factor is taken apart, its pieces share the labels in one `Grid`. `Ledger.settle` decides later
    what the code meant.

    Args:
        ledger: The ledger, which freezes the labels that a reshape loses.
        tag: The labels of the tensor.
        shape: Its new shape.
    """
    pool: deque[Factor] = deque(f for axis in tag.axes for f in axis)
    split_sizes = _split_sizes([f.size for f in pool], shape)
    if any(f.is_split and len(sizes) > 1 for f, sizes in zip(pool, split_sizes, strict=True)):
        pool = deque(f for axis in ledger.settle(tag).axes for f in axis)
        split_sizes = _split_sizes([f.size for f in pool], shape)
    pieces: deque[Factor] = deque()
    for f, sizes in zip(pool, split_sizes, strict=True):
        pieces.extend(_split(f, sizes))
    axes: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        need = size
        while need > 1 or (need == 1 and not axis and pieces and pieces[0].size == 1):
            f = pieces.popleft()
            while need % f.size:
                if f.size % need == 0 and not f.is_split:
                    f, rest = _split(f, [need, f.size // need])
                    pieces.appendleft(rest)
                else:  # the sizes do not nest, so the labels are lost
                    f = _merge(ledger, f, pieces.popleft())
            need //= f.size
            axis.append(f)
        axes.append(tuple(axis))
    if pieces and axes:
        axes[-1] = axes[-1] + tuple(pieces)
    return Tag(tuple(axes))


def _split_sizes(factors: Sequence[int], shape: Sequence[int]) -> list[list[int]]:
    """Return for each factor the sizes that the new shape cuts it into: its own size alone where it stays whole."""
    cuts: list[list[int]] = []
    needs = deque(s for s in shape if s > 1)
    need = needs.popleft() if needs else 1
    for i, size in enumerate(factors):
        if size == 1:
            cuts.append([1])
            continue
        sizes: list[int] = []
        rest = size
        while rest > 1:
            if rest % need == 0:
                step = need
            elif need % rest == 0:
                step = rest
            else:
                return cuts + [[f] for f in factors[i:]]
            sizes.append(step)
            rest //= step
            need //= step
            if need == 1:
                need = needs.popleft() if needs else 1
            if need == 1:
                break
        if rest > 1:
            sizes.append(rest)
        cuts.append(sizes)
    return cuts


def _split(f: Factor, sizes: Sequence[int]) -> list[Factor]:
    """Return the factors of these sizes that a factor is cut into."""
    if len(sizes) == 1:
        return [f]
    if f.grid is not None:
        return split_labels(f.grid.labels.reshape(sizes))
    mark = f.mark if f.mark is Mark.SAME else Mark.NONE
    return [Factor(size, mark) for size in sizes]


def _merge(ledger: Ledger, a: Factor, b: Factor) -> Factor:
    """Return one factor without labels for two that a reshape mixes, and freeze their labels."""
    for f in (a, b):
        if f.grid is not None:
            ledger.freeze(f.grid.labels, "a reshape that does not follow its channels")
    return Factor(a.size * b.size)


def pieces(ledger: Ledger, tag: Tag, axis: int, bounds: Sequence[tuple[int, int]]) -> list[Tag]:
    """Return the labels of pieces of a tensor that an axis is cut into, as by split, chunk, slice or unbind.

    Pieces of equal length that tile the axis are taken to be what ``chunk`` makes. Their members at equal places are
    joined, so that equal pieces remain when units are cut. Pieces of other lengths keep their labels, because an
    attribute may hold their lengths. Where the code means a fixed length instead, the self-check finds the disagreement
    and freezes the site.

    Args:
        ledger: The ledger, which joins and freezes labels.
        tag: The labels of the tensor.
        axis: The axis that is cut.
        bounds: The start and the stop of each piece.
    """
    factors = tag.axes[axis]
    size = sum(1 for _ in factors) and int(np.prod([f.size for f in factors]))
    if all(start == 0 and stop == size for start, stop in bounds):
        return [tag for _ in bounds]
    grid = factors[0].grid if len(factors) == 1 and factors[0].is_split else None
    inner = grid is not None and factors[0].part == grid.labels.ndim - 1
    if grid is not None and not (inner and ledger.by_dimension(grid.labels)):
        return [_piece_of_grid(ledger, tag, axis, stop - start) for start, stop in bounds]
    labels = ledger.read(tag, axis)
    settled = ledger.settle(tag)
    if (labels < 0).all():
        mark = factors[0].mark if len(factors) == 1 and factors[0].mark is Mark.SAME else Mark.NONE
        return [settled.with_axis(axis, plain(stop - start, mark)) for start, stop in bounds]
    length = bounds[0][1] - bounds[0][0]
    tiles = length > 0 and size % length == 0
    if tiles and all(b - a == length and a % length == 0 for a, b in bounds) and length > 1:
        for row in labels.reshape(-1, length)[1:]:
            ledger.join(labels[:length], row)
            ledger.freeze(np.where(row < 0, labels[:length], -1), "a chunk beside one that cannot be cut")
            ledger.freeze(np.where(labels[:length] < 0, row, -1), "a chunk beside one that cannot be cut")
    elif length == 1:
        ledger.freeze(labels, "single channels are picked by position")
    else:
        ledger.positional = True
    return [settled.with_axis(axis, labelled(labels[start:stop])) for start, stop in bounds]


def join_parts(ledger: Ledger, tag: Tag, dims: Sequence[int]) -> Tag:
    """Return the labels of a tensor after something mixes its entries along these axes.

    Where one of the axes is a part of split labels, such as the radix of a split attention, what lies at equal places
    of the other parts is joined. The axis then carries no labels.

    Args:
        ledger: The ledger, which joins labels.
        tag: The labels of the tensor.
        dims: The axes.
    """
    for d in dims:
        if len(tag.axes[d]) == 1 and tag.axes[d][0].is_split:
            tag = _piece_of_grid(ledger, tag, d, tag.axes[d][0].size)
    return tag


def _piece_of_grid(ledger: Ledger, tag: Tag, axis: int, length: int) -> Tag:
    """Return the labels of a piece of an axis that is one part of split labels.

    So q, k and v are pieces of a packed projection. The part stays constant when units are cut, and the labels at equal
    places of the other parts are joined.

    Args:
        ledger: The ledger, which joins labels.
        tag: The labels of the tensor.
        axis: The axis that is cut.
        length: The length of the piece.
    """
    (factor,) = tag.axes[axis]
    assert factor.grid is not None
    grid = np.moveaxis(factor.grid.labels, factor.part, 0)
    for row in grid[1:]:
        ledger.join(grid[0].reshape(-1), row.reshape(-1))
    rest = split_labels(grid[0])
    old_parts = [p for p in range(factor.grid.labels.ndim) if p != factor.part]

    def follow(f: Factor) -> Factor:
        if f.grid is not factor.grid:
            return f
        return Factor(length) if f is factor else rest[old_parts.index(f.part)]

    return Tag(tuple(tuple(follow(f) for f in a) for a in tag.axes))
