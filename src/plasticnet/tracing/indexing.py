"""Has the rules for operations that read, write or sum whole rows by an index, as graph networks and mixtures do.

The axis that is indexed is frozen. The other axes keep their labels where every channel does the same: where the index
has one entry for a whole row, or was expanded over the channels. An index that differs between channels keeps them only
if it has labels itself, because it is then cut with the channels, as the places are that ``sort`` returns.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from plasticnet.tools.torch_private import base_of, bound_arguments, schema_name
from plasticnet.tracing.labels import Axis, Tag, axis_size, has_labels, is_same, plain
from plasticnet.tracing.levers import layout
from plasticnet.tracing.mode import RULES, Tracer, rule
from plasticnet.tracing.views import dim_of, join_axes, tensors_in

_INDEXED = "indexed by position: an index is not followed, and a slice, split or chunk is"
_VARIES = "an index that may differ between its channels, and is not cut with them"
_PART = "only the first of its channels are indexed"

# For each axis of a tensor, which axis of another one lies beside it, or None.
_Beside = Sequence[int | None]


@layout("index", "_unsafe_index", "index_select")
def _index(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Freeze the axes that are indexed; the others keep their labels."""
    x: Tensor = args[0]
    tracer.ledger.settle(tracer.tag(x))
    indices = args[1] if schema_name(func) != "aten::index_select" else [None] * dim_of(args[1], x.dim()) + [args[2]]
    hit, beside = _layout(x, indices, out.dim())
    tracer.freeze(x, _INDEXED, hit)
    for t in tensors_in(args[1:]):
        tracer.freeze(t, "used as an index")
    tag = tracer.ledger.settle(tracer.tag(x))
    axes = [plain(n) if d is None else tag.axes[d] for n, d in zip(out.shape, beside, strict=True)]
    tracer.put(out, Tag(tuple(axes)))


def _layout(x: Tensor, indices: Sequence[Tensor | None], ndim: int | None = None) -> tuple[list[int], list[int | None]]:
    """Return which axes of a tensor are indexed, and for each axis of what is read there the axis that it was.

    Args:
        x: The tensor.
        indices: An index for each of its leading axes, or None; a mask stands for as many axes as it has.
        ndim: The number of axes of what is read, or None where it is not known.
    """
    hit: list[int] = []
    at = 0
    for index in indices:
        width = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        hit += range(at, at + width) if index is not None else []
        at += width
    rest = [d for d in range(x.dim()) if d not in hit]
    places = [i for i, index in enumerate(indices) if index is not None]
    together = bool(hit) and places == list(range(places[0], places[-1] + 1))
    lead = _index_dims(indices) if ndim is None else ndim - len(rest)
    first = sum(d < hit[0] for d in rest) if together else 0
    return hit, [*rest[:first], *[None] * lead, *rest[first:]]


def _index_dims(indices: Sequence[Tensor | None]) -> int:
    """Return how many axes indices have together; a mask becomes a list of places."""
    return max((1 if i.dtype in (torch.bool, torch.uint8) else i.dim() for i in indices if i is not None), default=0)


@layout("gather")
def _gather(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Read entries at places that an index of the shape of the result names, along one axis."""
    x, dim, index = args[:3]
    dims = [dim_of(dim, x.dim())] if x.dim() else []
    _check_index(tracer, index, [tracer.tag(x)], dims)
    _meet(tracer, out, index, [(tracer.tag(x), range(index.dim()))], dims)
    tracer.freeze(x, _INDEXED, dims)


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def _scatter(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Write entries to places that an index of their shape names, along one axis."""
    x, dim, index = args[:3]
    dims = [dim_of(dim, x.dim())] if x.dim() else []
    others = [tracer.tag(t) for t in tensors_in(bound_arguments(func, args, kwargs).get("src"))]
    _check_index(tracer, index, [tracer.tag(x), *others], dims)
    _meet(tracer, out, x, [(t, range(x.dim())) for t in (tracer.tag(index), *others)], dims)
    for t in (x, *tensors_in(args[3:], kwargs)):
        tracer.freeze(t, _INDEXED, [d for d in dims if d < t.dim()])


def _check_index(tracer: Tracer, index: Tensor, others: Sequence[Tag], dims: Sequence[int]) -> None:
    """Freeze the channels of tensors that an index tells apart without labels of its own, and the axis of its places.

    Args:
        tracer: The tracer.
        index: The index, which has the axes of the tensors.
        others: The labels of the tensors.
        dims: The axis whose places it names.
    """
    tracer.freeze(index, "used as an index", dims)
    tag = tracer.tag(index)
    for d, axis in enumerate(tag.axes):
        if d not in dims and not has_labels(axis) and not is_same(axis):
            for other in others:
                tracer.freeze_axes(other, _VARIES, [d])


@rule("index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_", "index_fill",
      "index_fill_")  # fmt: skip
def _index_add(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Write whole slices to places along one axis."""
    x, dim, index, *values = args
    dims = [dim_of(dim, x.dim())] if x.dim() else []
    sources = [t for t in tensors_in(values, kwargs) if t.dim() == x.dim() and x.dim()]
    _meet(tracer, out, x, [(tracer.tag(t), range(t.dim())) for t in sources], dims)
    tracer.freeze(index, "used as an index")
    for t in (x, *sources):
        tracer.freeze(t, _INDEXED, dims)


@rule("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
def _index_put(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Write values to the places where `_index` would read, as ``x[rows] = values`` does."""
    x, indices, values = args[:3]
    (mask, *more) = indices
    if not more and mask is not None and mask.dtype == torch.bool and mask.dim() == x.dim() and values.numel() == 1:
        RULES["aten::pointwise"](tracer, func, (x, mask, values), {}, out)  # x[x < 0] = 0
        return
    hit, beside = _layout(x, indices)
    at = len(beside) - values.dim()  # values broadcast over what `_index` would read
    places: list[int | None] = [None] * x.dim()
    for place, d in enumerate(beside):
        if d is not None and place >= at:
            places[d] = place - at
    lead = [place - at for place, d in enumerate(beside) if d is None and place >= at]
    tracer.freeze(values, _INDEXED, lead)
    _meet(tracer, out, x, [(tracer.tag(values), places)], hit)
    tracer.freeze(x, _INDEXED, hit)
    for t in tensors_in(indices):
        tracer.freeze(t, "used as an index")


def _meet(
    tracer: Tracer, out: Tensor, target: Tensor, others: Sequence[tuple[Tag, _Beside]], hit: Collection[int]
) -> None:
    """Join the axes of a tensor with those of others that lie beside them, and attach the labels to a result.

    Args:
        tracer: The tracer.
        out: The result, with the axes of the tensor. It may be the tensor itself, which was then written to.
        target: The tensor.
        others: The labels of each of the others, and for each axis of the tensor which axis of it lies beside it.
        hit: The axes that are indexed, which get no labels.
    """
    before = tracer.ledger.settle(tracer.tag(target))
    settled = [(tracer.ledger.settle(tag), beside) for tag, beside in others]
    axes: list[Axis] = []
    for d, size in enumerate(out.shape):
        if d in hit:
            axes.append(plain(size))
            continue
        places = [(before, d), *((t, a) for t, beside in settled if (a := beside[d]) is not None)]
        full = [(t, a) for t, a in places if axis_size(t.axes[a]) == size]
        for t, a in places:
            if axis_size(t.axes[a]) != size:
                for tag, axis in ((t, a), *(full if axis_size(t.axes[a]) > 1 else ())):
                    tracer.freeze_axes(tag, _PART, [axis])
        part = out is target and base_of(target) is not None
        axes.append(join_axes(tracer, full, size, part))
    static = all(tag.static or tag.blank for tag in (before, *(tag for tag, _ in others)))
    tracer.put(out, Tag(tuple(axes), static=static, blank=before.blank and out is target))


@rule("segment_reduce")
def _segment_reduce(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Reduce stretches of rows, along one axis."""
    x: Tensor = args[0]
    axis = dim_of(bound_arguments(func, args, kwargs)["axis"], x.dim())
    tracer.freeze(x, "reduced over its channels by aten::segment_reduce", range(axis + 1))
    for t in tensors_in(args[1:], kwargs):
        tracer.freeze(t, "used as lengths of segments")
    tag = tracer.ledger.settle(tracer.tag(x))
    tracer.put(out, Tag((*map(plain, out.shape[: axis + 1]), *tag.axes[axis + 1 :]), static=tag.static))


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Sum rows of a table, which may be an activation, by an index."""
    bound = bound_arguments(func, args, kwargs)
    table, index = bound["weight"], bound["indices"]
    if not tracer.tag(table).static:
        tracer.freeze(table, _INDEXED, [0])
        axis = tracer.ledger.settle(tracer.tag(table)).axes[1]
    else:
        rows = table.new_empty(*index.shape, table.shape[1])
        RULES["aten::embedding"](tracer, func, (table, index), {}, rows)
        axis = tracer.tag(rows).axes[-1]
    for t in tensors_in(index, bound["offsets"], bound["per_sample_weights"]):
        tracer.freeze(t, "used as an index, or as the weight of a row")
    tracer.put(out[0], Tag((plain(out[0].shape[0]), axis)))


@rule("_sparse_addmm", "_sparse_mm_reduce_impl")
def _sparse(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Move labels as a dense product does, of a sparse matrix and a dense one."""
    first = len(args) > 2 and isinstance(args[2], Tensor)
    product = out if isinstance(out, Tensor) else out[0]
    RULES["aten::mm"](tracer, func, args[1:3] if first else args[:2], {}, product)
    if first and tracer.tag(args[0]).labelled:
        RULES["aten::pointwise"](tracer, func, (product, args[0]), {}, product)
