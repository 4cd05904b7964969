"""Has the rules for operations that only lay out entries anew: views, permutations, pieces, and writes into views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from plasticnet.tools.torch_private import bound_arguments, schema_name
from plasticnet.tracing.labels import (
    NO_LEVERS,
    Axis,
    Mark,
    Tag,
    axis_size,
    has_labels,
    is_batch,
    is_same,
    labelled,
    plain,
)
from plasticnet.tracing.layout import pieces, reshape
from plasticnet.tracing.levers import follow, layout, together
from plasticnet.tracing.mode import Tracer, rule


def tensors_in(*trees: Any) -> list[Tensor]:
    """Return the tensors among arguments, in order."""
    return [t for t in tree_leaves(trees) if isinstance(t, Tensor)]


def dim_of(dim: int, ndim: int) -> int:
    """Return a dimension counted from the front."""
    return dim % max(ndim, 1)


_PLAIN = "something that has nothing to cut there"


def join_axes(
    tracer: Tracer, places: list[tuple[Tag, int]], size: int, part: bool = False, beside: str = _PLAIN
) -> Axis:
    """Return the axis of the result where tensors are combined entry by entry, and join the labels of their axes.

    Args:
        tracer: The tracer.
        places: The tag of each tensor, and the place of its axis.
        size: The length of the axis.
        part: Whether the result is written into the first tensor, which is a view of another one. If its entries were
            equal, the labels cannot pass, because the other tensor gets none.
        beside: What has nothing to cut there, if one of them has not, for people to read.
    """
    factors = [t.axes[a] for t, a in places]
    found = next((f for f in factors if has_labels(f)), None)
    if found is None:
        batch = next((f for f in factors if is_batch(f)), None)
        return batch or (factors[0] if all(is_same(f) for f in factors) else plain(size))
    if all(f is found for f in factors):
        return found
    union, compared = np.full(size, -1, dtype=np.int64), False
    written = part and is_same(factors[0])
    for n, (t, a) in enumerate(places):
        if is_same(t.axes[a]) and not (written and n == 0):
            continue
        labels = tracer.ledger.read(t, a)
        if compared:
            tracer.meet(union, labels, f"combined with {beside}")
            # What a constant freezes keeps its labels, so that it is named as what produces units.
            kept = beside != _PLAIN and not part
            union = np.where(union < 0, labels, union) if kept else np.where(labels < 0, -1, union)
        else:
            union, compared = labels, True
    complete = (tracer.ledger.read(Tag((found,)), 0) == union).all()
    return found if complete else labelled(union)


@layout("view", "_unsafe_view", "_reshape_alias", "reshape")
def _view(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    if tuple(out.shape) == tuple(args[0].shape):
        tracer.put(out, tracer.tag(args[0]))
        return
    tracer.put(out, reshape(tracer.ledger, tracer.tag(args[0]), out.shape))


@layout("detach", "alias", "contiguous", "lift_fresh", "lift_fresh_copy", "resolve_conj", "resolve_neg", "_conj")
def _same(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tracer.put(out, tracer.tag(args[0]))


@layout("as_strided", "as_strided_")
def _strided(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Keep labels where only strides are set, as in pooling to one position; any other layout is unknown."""
    if tuple(args[1]) != tuple(tracer.tag(args[0]).shape):
        tracer.unknown(func, [args[0]])
    tracer.put(out, tracer.tag(args[0]))


def _permuted(tracer: Tracer, x: Tensor, order: Sequence[int], out: Tensor) -> None:
    """Attach to a result the labels of ``x`` with its axes in another order."""
    axes = tracer.tag(x).axes
    tracer.put(out, Tag(tuple(axes[i] for i in order)))


@rule("_pack_padded_sequence", "_pad_packed_sequence")
def _pack(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Turn the two leading axes, time and batch, into one, or one into two."""
    behind = args[0].dim() - 1 if schema_name(func) == "aten::_pad_packed_sequence" else args[0].dim() - 2
    tag = tracer.ledger.settle(tracer.tag(args[0]))
    lead = out[0].shape[: out[0].dim() - behind]
    tracer.put(out[0], Tag((*map(plain, lead), *tag.axes[len(tag.axes) - behind :])))


@layout("view_as_complex", "view_as_real")
def _pairs(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Drop or add the last axis, on which the two parts of a complex number are neighbours."""
    axes = tracer.tag(args[0]).axes
    tracer.put(out, Tag(axes[:-1] if schema_name(func) == "aten::view_as_complex" else (*axes, plain(2))))


@layout("t", "t_", "numpy_T")
def _t(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    _permuted(tracer, args[0], range(args[0].dim())[::-1], out)


@layout("transpose", "transpose_")
def _transpose(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    order = list(range(out.dim()))
    a, b = dim_of(args[1], out.dim()), dim_of(args[2], out.dim())
    order[a], order[b] = order[b], order[a]
    _permuted(tracer, args[0], order, out)


@layout("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _shuffle(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Move labels as the reshape, the permutation and the second reshape do that such an operation is made of."""
    *lead, c, h, w = args[0].shape
    n, r = len(lead), args[1]
    if schema_name(func) == "aten::pixel_shuffle":
        split, order = (c // r**2, r, r, h, w), (0, 3, 1, 4, 2)
    elif schema_name(func) == "aten::pixel_unshuffle":
        split, order = (c, h // r, r, w // r, r), (0, 2, 4, 1, 3)
    else:
        split, order = (r, c // r, h, w), (1, 0, 2, 3)
    tag = reshape(tracer.ledger, tracer.tag(args[0]), (*lead, *split))
    axes = (*tag.axes[:n], *(tag.axes[n + i] for i in order))
    tracer.put(out, reshape(tracer.ledger, Tag(axes), out.shape))


@layout("tril", "triu", "tril_", "triu_")
def _triangle(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Freeze the two last axes, whose entries are set to zero by their places; the others keep their labels."""
    plane = range(out.dim() - 2, out.dim())
    tracer.freeze(args[0], f"cut to a triangle with its channels by {schema_name(func)}", plane)
    tag = tracer.ledger.settle(tracer.tag(args[0]))
    tracer.put(out, Tag((*tag.axes[:-2], *map(plain, out.shape[-2:]))))


@layout("diagonal")
def _diagonal(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Read the diagonal of two axes, which are frozen, into a new axis at the end; the others keep their labels."""
    x: Tensor = args[0]
    bound = bound_arguments(func, args, kwargs)
    plane = [dim_of(bound[name], x.dim()) for name in ("dim1", "dim2")]
    tracer.freeze(x, "read along a diagonal of its channels", plane)
    tag = tracer.ledger.settle(tracer.tag(x))
    tracer.put(out, Tag((*(a for d, a in enumerate(tag.axes) if d not in plane), plain(out.shape[-1]))))


@layout("permute")
def _permute(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    _permuted(tracer, args[0], [dim_of(d, out.dim()) for d in args[1]], out)


@layout("unsqueeze")
def _unsqueeze(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    axes = list(tracer.tag(args[0]).axes)
    axes.insert(dim_of(args[1], out.dim()), ())
    tracer.put(out, Tag(tuple(axes)))


@layout("squeeze")
def _squeeze(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x: Tensor = args[0]
    asked = args[1] if len(args) > 1 else range(x.dim())
    dims = [dim_of(d, x.dim()) for d in (asked if isinstance(asked, list | tuple | range) else [asked])]
    gone = [d for d in dims if x.shape[d] == 1]
    tracer.freeze(x, "a single channel is squeezed away", gone)
    tracer.put(out, Tag(tuple(a for d, a in enumerate(tracer.tag(x).axes) if d not in gone)))


@layout("squeeze_", "unsqueeze_")
def _axes_in_place(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Take axes of length 1 away, or add one, in a tensor that had other axes when it got its labels."""
    axes = list((tracer.tags.get(args[0]) or tracer.tag(args[0])).axes)
    if schema_name(func) == "aten::unsqueeze_":
        axes.insert(dim_of(args[1], out.dim()), ())
    else:
        asked = args[1] if len(args) > 1 else range(len(axes))
        dims = {dim_of(d, len(axes)) for d in (asked if isinstance(asked, list | tuple | range) else [asked])}
        gone = [d for d in dims if axis_size(axes[d]) == 1]
        tracer.freeze_axes(Tag(tuple(axes)), "a single channel is squeezed away", gone)
        axes = [a for d, a in enumerate(axes) if d not in gone]
    tracer.put(out, Tag(tuple(axes)))


@layout("expand")
def _expand(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    axes = list(tracer.tag(args[0]).axes)
    new = out.dim() - len(axes)
    result: list[Axis] = [plain(n, Mark.SAME) for n in out.shape[:new]]
    for axis, n in zip(axes, out.shape[new:], strict=True):
        if axis_size(axis) != n and has_labels(axis):
            tracer.ledger.freeze(tracer.ledger.read(Tag((axis,)), 0), "one channel broadcast over many")
        result.append(axis if axis_size(axis) == n else plain(n, Mark.SAME))
    tracer.put(out, Tag(tuple(result)))


@layout("repeat")
def _repeat(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tag = tracer.tag(args[0])
    new = out.dim() - len(tag.axes)
    result: list[Axis] = [plain(n, Mark.SAME) for n in out.shape[:new]]
    for axis, times in zip(tag.axes, args[1][new:], strict=True):
        if times == 1:
            result.append(axis)
        elif not has_labels(axis):
            equal = axis_size(axis) == 1 or is_same(axis)
            result.append(plain(axis_size(axis) * times, Mark.SAME if equal else Mark.NONE))
        else:
            result.append(labelled(np.tile(tracer.ledger.read(Tag((axis,)), 0), times)))
    tracer.put(out, Tag(tuple(result)))


@rule("cat", "concat")
def _cat(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    parts = [t for t in args[0] if t.numel() or t.dim() == out.dim()]
    dim = dim_of(args[1] if len(args) > 1 else kwargs.get("dim", 0), out.dim())
    tags = [tracer.ledger.settle(tracer.tag(t)) for t in parts]
    axes = []
    for d in range(out.dim()):
        if d == dim:
            axes.append(labelled(np.concatenate([_joined(tracer, t, d) for t in tags])))
        else:
            axes.append(join_axes(tracer, [(t, d) for t in tags], out.shape[d]))
    if len(parts) == 1:
        axes[dim] = tags[0].axes[dim]
    levers = [together(tracer, [(t, d) for t in tags], -1 if d == dim else n) for d, n in enumerate(out.shape)]
    tracer.put(out, Tag(tuple(axes), tuple(levers), all(t.static for t in tags)))


def _joined(tracer: Tracer, tag: Tag, axis: int) -> np.ndarray:
    """Return the labels of a tensor that is put beside others; equal entries get labels, because they may be units."""
    return tracer.ledger.free(axis_size(tag.axes[axis])) if is_same(tag.axes[axis]) else tracer.ledger.read(tag, axis)


@rule("stack")
def _stack(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = dim_of(args[1] if len(args) > 1 else kwargs.get("dim", 0), out.dim())
    tags = [tracer.ledger.settle(tracer.tag(t)) for t in args[0]]
    axes = [
        join_axes(tracer, [(t, d) for t in tags], n)
        for d, n in enumerate(s for i, s in enumerate(out.shape) if i != dim)
    ]
    levers = [together(tracer, [(t, d) for t in tags], axis_size(axis)) for d, axis in enumerate(axes)]
    axes.insert(dim, plain(out.shape[dim]))
    levers.insert(dim, NO_LEVERS)
    tracer.put(out, Tag(tuple(axes), tuple(levers), all(t.static for t in tags)))


@layout("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def _split(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    x: Tensor = args[0]
    unbind = schema_name(func) == "aten::unbind"
    position = 1 if unbind else 2
    dim = dim_of(args[position] if len(args) > position else kwargs.get("dim", 0), x.dim())
    sizes = [1 if unbind else o.shape[dim] for o in out]
    stops = np.cumsum(sizes)
    bounds = [(int(stop) - size, int(stop)) for stop, size in zip(stops, sizes, strict=True)]
    for o, tag in zip(out, pieces(tracer.ledger, tracer.tag(x), dim, bounds), strict=True):
        tracer.put(o, Tag(tuple(a for d, a in enumerate(tag.axes) if d != dim)) if unbind else tag)


@layout("slice")
def _slice(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x: Tensor = args[0]
    dim = dim_of(args[1] if len(args) > 1 else 0, x.dim())
    start, stop, step = (*args[2:], *(None, None, 1)[max(len(args) - 2, 0) :])
    start, stop, step = slice(start, stop, step).indices(x.shape[dim])
    if step != 1:
        tracer.freeze(x, "cut with a stride", [dim])
        tracer.put(out, tracer.tag(x).with_axis(dim, plain(out.shape[dim])))
    else:
        (tag,) = pieces(tracer.ledger, tracer.tag(x), dim, [(start, max(start, stop))])
        tracer.put(out, tag)


@layout("select")
def _select(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = dim_of(args[1], args[0].dim())
    index = args[2] % args[0].shape[dim]
    (tag,) = pieces(tracer.ledger, tracer.tag(args[0]), dim, [(index, index + 1)])
    tracer.put(out, Tag(tuple(a for d, a in enumerate(tag.axes) if d != dim)))


@rule("glu")
def _glu(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = dim_of(args[1] if len(args) > 1 else -1, out.dim())
    n = out.shape[dim]
    halves = pieces(tracer.ledger, tracer.tag(args[0]), dim, [(0, n), (n, 2 * n)])
    tracer.put(out, Tag(halves[0].axes))


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d")  # fmt: skip
def _pad(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tag = tracer.tag(args[0])
    padding = args[1]
    axes: list[Axis] = []
    for d, axis in enumerate(tag.axes):
        at = 2 * (len(tag.axes) - 1 - d)
        before, after = padding[at : at + 2] if at + 1 < len(padding) else (0, 0)
        if before == after == 0:
            axes.append(axis)
        elif before < 0 or after < 0 or (has_labels(axis) and schema_name(func) != "aten::constant_pad_nd"):
            tracer.freeze(args[0], "padded over its channels", [d])
            axes.append(plain(out.shape[d]))
        else:
            labels = tracer.ledger.read(tag, d)
            axes.append(labelled(np.pad(labels, (before, after), constant_values=-1)))
    value = args[2] if schema_name(func) == "aten::constant_pad_nd" and len(args) > 2 else 0
    result = Tag(tuple(axes))
    tracer.put(out, follow(tracer.ledger, tag, result) if value == 0 else result)
