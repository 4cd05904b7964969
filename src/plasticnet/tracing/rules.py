"""How ATen operations move labels, by family. An operation without a rule freezes what it touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from plasticnet.tracing.labels import (
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
from plasticnet.tracing.mode import Tracer, rule


def _tensors(*trees: Any) -> list[Tensor]:
    return [t for t in tree_leaves(trees) if isinstance(t, Tensor)]


def _dim(dim: int, ndim: int) -> int:
    return dim % max(ndim, 1)


# -- pointwise ------------------------------------------------------------------------------


@rule("pointwise", "hardswish", "hardswish_", "_prelu_kernel", "copy_", "log_sigmoid_forward", "masked_fill",
      "masked_fill_", "where", "lerp", "addcmul", "addcdiv", "_to_copy", "native_dropout", "clamp", "fill_", "zero_",
      "bernoulli_", "uniform_", "normal_", "rand_like", "randn_like", "celu", "clone")  # fmt: skip
def pointwise(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Aligned axes of equal length are joined index by index."""
    operands = _tensors(args, kwargs)
    results = _tensors(out)
    in_place = bool(operands) and any(r is operands[0] for r in results)
    tags = [tracer.tag(t) for t in operands]
    if len(tags) == 1:
        tag = tags[0]
        keep = tag.source is not None and func._schema.name in ("aten::_to_copy", "aten::clone")
        result = tag if keep or in_place else Tag(tag.axes)
    else:
        result = _broadcast(tracer, operands, tags, results[0].dim() if results else 0, in_place)
    for r in results:
        if r.dim() == len(result.axes):
            tracer.put(r, result)


def _broadcast(tracer: Tracer, operands: list[Tensor], tags: list[Tag], ndim: int, in_place: bool) -> Tag:
    if any(t.labelled for t in tags):
        tags = [tracer.ledger.settle(t) for t in tags]
    axes: list[Axis] = []
    for i in range(-ndim, 0):
        here = [(t, len(t.axes) + i) for t in tags if len(t.axes) >= -i]
        size = max((axis_size(t.axes[a]) for t, a in here), default=1)
        full = [(t, a) for t, a in here if axis_size(t.axes[a]) == size]
        for t, a in here:
            if axis_size(t.axes[a]) != size and has_labels(t.axes[a]):
                tracer.ledger.freeze(tracer.ledger.read(t, a), "one channel broadcast over many")
        axes.append(_join_axis(tracer, full, size, in_place))
    return Tag(tuple(axes))


def _join_axis(tracer: Tracer, places: list[tuple[Tag, int]], size: int, in_place: bool) -> Axis:
    factors = [t.axes[a] for t, a in places]
    found = next((f for f in factors if has_labels(f)), None)
    if found is None:
        batch = next((f for f in factors if is_batch(f)), None)
        return batch or (factors[0] if all(is_same(f) for f in factors) else plain(size))
    if all(f is found for f in factors):
        return found
    union, compared = np.full(size, -1, dtype=np.int64), False
    written = in_place and is_same(factors[0])  # equal entries that are written to are not equal any more
    for n, (t, a) in enumerate(places):
        if is_same(t.axes[a]) and not (written and n == 0):
            continue
        labels = tracer.ledger.read(t, a)
        if compared:
            tracer.meet(union, labels, "combined with something that has nothing to cut there")
        union, compared = np.where(union >= 0, union, labels), True
    complete = (tracer.ledger.read(Tag((found,)), 0) == union).all()
    return found if complete else labelled(union)


# -- layout ---------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def _view(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    if tuple(out.shape) == tuple(args[0].shape):
        tracer.put(out, tracer.tag(args[0]))
    else:
        tracer.put(out, reshape(tracer.ledger, tracer.tag(args[0]), out.shape))


@rule("detach", "alias", "contiguous", "lift_fresh", "lift_fresh_copy", "resolve_conj", "resolve_neg")
def _same(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tracer.put(out, tracer.tag(args[0]))


def _permuted(tracer: Tracer, x: Tensor, order: Sequence[int], out: Tensor) -> None:
    tag = tracer.tag(x)
    dims = tuple(tag.dims[i] for i in order) if tag.dims else ()
    tracer.put(out, Tag(tuple(tag.axes[i] for i in order), tag.source, dims))


@rule("t", "numpy_T")
def _t(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    _permuted(tracer, args[0], range(args[0].dim())[::-1], out)


@rule("transpose", "transpose_")
def _transpose(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    order = list(range(out.dim()))
    a, b = _dim(args[1], out.dim()), _dim(args[2], out.dim())
    order[a], order[b] = order[b], order[a]
    _permuted(tracer, args[0], order, out)


@rule("permute")
def _permute(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    _permuted(tracer, args[0], [_dim(d, out.dim()) for d in args[1]], out)


@rule("unsqueeze")
def _unsqueeze(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    axes = list(tracer.tag(args[0]).axes)
    axes.insert(_dim(args[1], out.dim()), ())
    tracer.put(out, Tag(tuple(axes)))


@rule("squeeze")
def _squeeze(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x: Tensor = args[0]
    asked = args[1] if len(args) > 1 else range(x.dim())
    dims = [_dim(d, x.dim()) for d in (asked if isinstance(asked, list | tuple | range) else [asked])]
    gone = [d for d in dims if x.shape[d] == 1]
    tracer.freeze(x, "a single channel is squeezed away", gone)
    tracer.put(out, Tag(tuple(a for d, a in enumerate(tracer.tag(x).axes) if d not in gone)))


@rule("expand")
def _expand(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    axes = list(tracer.tag(args[0]).axes)
    new = out.dim() - len(axes)
    result: list[Axis] = [plain(n, Mark.SAME) for n in out.shape[:new]]
    for axis, n in zip(axes, out.shape[new:], strict=True):
        if axis_size(axis) != n and has_labels(axis):
            tracer.ledger.freeze(tracer.ledger.read(Tag((axis,)), 0), "one channel broadcast over many")
        result.append(axis if axis_size(axis) == n else plain(n, Mark.SAME))
    tracer.put(out, Tag(tuple(result)))


@rule("repeat")
def _repeat(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tag = tracer.tag(args[0])
    new = out.dim() - len(tag.axes)
    result: list[Axis] = [plain(n, Mark.SAME) for n in out.shape[:new]]
    for axis, times in zip(tag.axes, args[1][new:], strict=True):
        if times == 1:
            result.append(axis)
        elif not has_labels(axis):
            result.append(plain(axis_size(axis) * times))
        else:
            result.append(labelled(np.tile(tracer.ledger.read(Tag((axis,)), 0), times)))
    tracer.put(out, Tag(tuple(result)))


@rule("cat", "concat")
def _cat(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    parts = [t for t in args[0] if t.numel() or t.dim() == out.dim()]
    dim = _dim(args[1] if len(args) > 1 else kwargs.get("dim", 0), out.dim())
    tags = [tracer.ledger.settle(tracer.tag(t)) for t in parts]
    axes = []
    for d in range(out.dim()):
        if d == dim:
            axes.append(labelled(np.concatenate([tracer.ledger.read(t, d) for t in tags])))
        else:
            axes.append(_join_axis(tracer, [(t, d) for t in tags], out.shape[d], in_place=False))
    if len(parts) == 1:
        axes[dim] = tags[0].axes[dim]
    tracer.put(out, Tag(tuple(axes)))


@rule("stack")
def _stack(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = _dim(args[1] if len(args) > 1 else kwargs.get("dim", 0), out.dim())
    tags = [tracer.ledger.settle(tracer.tag(t)) for t in args[0]]
    axes = [
        _join_axis(tracer, [(t, d) for t in tags], n, in_place=False)
        for d, n in enumerate(s for i, s in enumerate(out.shape) if i != dim)
    ]
    axes.insert(dim, plain(out.shape[dim]))
    tracer.put(out, Tag(tuple(axes)))


@rule("split", "split_with_sizes", "chunk", "unbind")
def _split(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    x: Tensor = args[0]
    unbind = func._schema.name == "aten::unbind"
    position = 1 if unbind else 2
    dim = _dim(args[position] if len(args) > position else kwargs.get("dim", 0), x.dim())
    sizes = [1 if unbind else o.shape[dim] for o in out]
    stops = np.cumsum(sizes)
    bounds = [(int(stop) - size, int(stop)) for stop, size in zip(stops, sizes, strict=True)]
    for o, tag in zip(out, pieces(tracer.ledger, tracer.tag(x), dim, bounds), strict=True):
        tracer.put(o, Tag(tuple(a for d, a in enumerate(tag.axes) if d != dim)) if unbind else tag)


@rule("slice")
def _slice(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x: Tensor = args[0]
    dim = _dim(args[1] if len(args) > 1 else 0, x.dim())
    start, stop, step = (*args[2:], *(None, None, 1)[max(len(args) - 2, 0) :])
    start, stop, step = slice(start, stop, step).indices(x.shape[dim])
    if step != 1:
        tracer.freeze(x, "cut with a stride", [dim])
        tracer.put(out, tracer.tag(x).with_axis(dim, plain(out.shape[dim])))
    else:
        (tag,) = pieces(tracer.ledger, tracer.tag(x), dim, [(start, max(start, stop))])
        tracer.put(out, tag)


@rule("select")
def _select(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = _dim(args[1], args[0].dim())
    index = args[2] % args[0].shape[dim]
    (tag,) = pieces(tracer.ledger, tracer.tag(args[0]), dim, [(index, index + 1)])
    tracer.put(out, Tag(tuple(a for d, a in enumerate(tag.axes) if d != dim)))


@rule("glu")
def _glu(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = _dim(args[1] if len(args) > 1 else -1, out.dim())
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
        elif before < 0 or after < 0 or (has_labels(axis) and func._schema.name != "aten::constant_pad_nd"):
            tracer.freeze(args[0], "padded over its channels", [d])
            axes.append(plain(out.shape[d]))
        else:
            labels = tracer.ledger.read(tag, d)
            axes.append(labelled(np.pad(labels, (before, after), constant_values=-1)))
    tracer.put(out, Tag(tuple(axes)))


# -- reductions and everything that leaves the channels alone ---------------------------------


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "max", "min", "any", "all", "prod", "argmax",
      "argmin", "logsumexp", "var_mean", "std_mean", "norm")  # fmt: skip
def _reduce(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x: Tensor = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):  # max(x, y) is pointwise
        return pointwise(tracer, func, args, kwargs, out)
    dims, keepdim = _reduced_dims(func, args, kwargs, x.dim())
    tracer.freeze(x, f"reduced over its channels by {func._schema.name}", dims)
    tag = tracer.ledger.settle(tracer.tag(x))
    axes = [() if d in dims else a for d, a in enumerate(tag.axes)]
    if not keepdim:
        axes = [a for d, a in enumerate(axes) if d not in dims]
    for o in _tensors(out):
        if o.dim() == len(axes):
            tracer.put(o, Tag(tuple(axes)))


def _reduced_dims(func: Any, args: Any, kwargs: Any, ndim: int) -> tuple[list[int], bool]:
    bound: dict[str, Any] = {}
    for i, parameter in enumerate(func._schema.arguments):
        bound[parameter.name] = args[i] if i < len(args) else kwargs.get(parameter.name, parameter.default_value)
    dim = bound.get("dim")
    if dim is None or dim == []:
        return list(range(ndim)), bool(bound.get("keepdim", False))
    return [_dim(d, ndim) for d in (dim if isinstance(dim, list | tuple) else [dim])], bool(bound.get("keepdim", False))


@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod")
def _softmax(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = _dim(args[1], out.dim())
    tag = tracer.ledger.settle(tracer.tag(args[0]))
    tracer.freeze(args[0], f"normalised over its channels by {func._schema.name}", [dim])
    tracer.put(out, Tag(tag.axes))


@rule("flip", "roll")
def _reorder(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Along an axis without units the entries change places and stay what they are."""
    dims = [_dim(d, out.dim()) for d in (args[-1] if isinstance(args[-1], list | tuple) else [args[-1]])]
    tracer.freeze(args[0], f"reordered over its channels by {func._schema.name}", dims)
    tag = tracer.ledger.settle(tracer.tag(args[0]))
    tracer.put(out, Tag(tuple(plain(out.shape[d]) if d in dims else a for d, a in enumerate(tag.axes))))


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
      "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_nearest3d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
      "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def _spatial(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Acts on trailing axes, each channel by itself."""
    tag = tracer.ledger.settle(tracer.tag(args[0]))
    trailing = 3 if "3d" in func._schema.name else 1 if "1d" in func._schema.name else 2
    leading = len(tag.axes) - trailing
    tracer.freeze(args[0], f"mixed over its channels by {func._schema.name}", range(leading, len(tag.axes)))
    for o in _tensors(out):
        tracer.put(o, Tag((*tag.axes[:leading], *map(plain, o.shape[leading:]))))


@rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty",
      "empty_like", "new_empty", "empty_strided", "new_empty_strided", "scalar_tensor")  # fmt: skip
def _constant(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Equal entries, or none yet (dropout fills them with noise): any subset of them will do."""
    tracer.put(out, Tag(tuple(plain(n, Mark.SAME) for n in out.shape)))


@rule("_local_scalar_dense", "item", "equal", "_assert_async", "_assert_scalar", "_is_all_true")
def _value(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A number read from a tensor can steer anything."""
    for t in _tensors(args, kwargs):
        tracer.freeze(t, f"its value is read by {func._schema.name}")


@rule("index", "index_select", "gather")
def _index(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Axes that are indexed lose their labels; the others keep them where the layout is plain."""
    x: Tensor = args[0]
    tag = tracer.ledger.settle(tracer.tag(x))
    if func._schema.name == "aten::index":
        indices = [*args[1], *[None] * (x.dim() - len(args[1]))]
        hit = [d for d, i in enumerate(indices) if i is not None]
        plain_layout = len(hit) == 1 and indices[hit[0]].dim() == 1 and indices[hit[0]].dtype != torch.bool
    else:
        hit, plain_layout = [_dim(args[1], x.dim())], func._schema.name == "aten::index_select"
    tracer.freeze(x, "indexed by position", hit)
    for t in _tensors(args[1:]):
        tracer.freeze(t, "used as an index")
    if plain_layout:
        tracer.put(out, tag.with_axis(hit[0], plain(out.shape[hit[0]])))
    elif hit == [0] and len(out.shape) >= x.dim() - 1 and func._schema.name == "aten::index":
        lead = out.dim() - (x.dim() - 1)
        tracer.put(out, Tag((*map(plain, out.shape[:lead]), *tag.axes[1:])))
    else:
        tracer.freeze(x, "indexed by position")
