"""Has the rules for operations that work entry by entry, reduce, pool or index. Without a rule, labels are frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plasticnet.tools.torch_private import schema_arguments, schema_name
from plasticnet.tracing.labels import Axis, Mark, Tag, axis_size, has_labels, plain
from plasticnet.tracing.layout import join_parts
from plasticnet.tracing.levers import follow, layout, pointwise_levers
from plasticnet.tracing.mode import Tracer, rule
from plasticnet.tracing.readers import close_at_birth
from plasticnet.tracing.statistics import normalise
from plasticnet.tracing.views import dim_of, join_axes, tensors_in, write


@rule("pointwise", "hardswish", "hardswish_", "_prelu_kernel", "copy_", "log_sigmoid_forward", "masked_fill",
      "masked_fill_", "where", "lerp", "addcmul", "addcdiv", "_to_copy", "native_dropout", "clamp", "fill_", "zero_",
      "bernoulli", "bernoulli_", "uniform_", "normal_", "exponential_", "log_normal_", "cauchy_", "geometric_",
      "random_", "rand_like", "randn_like", "randint_like", "celu", "clone", "complex", "polar")  # fmt: skip
def pointwise(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Join aligned axes of equal length, index by index."""
    if schema_name(func) == "aten::copy_" and write(tracer, args[0], args[1]):
        return
    operands = tensors_in(args, kwargs)
    results = tensors_in(out)
    in_place = bool(operands) and any(r is operands[0] for r in results)
    tags = [tracer.tag(t) for t in operands]
    if len(tags) == 1:
        result = Tag(tags[0].axes, blank=tags[0].blank and in_place)
    else:
        result = _broadcast(tracer, operands, tags, results[0].dim() if results else 0, in_place)
    result = pointwise_levers(tracer, func, args, kwargs, operands, result)
    for r in results:
        if r.dim() == len(result.axes):
            tracer.put(r, result)


def _broadcast(tracer: Tracer, operands: list[Tensor], tags: list[Tag], ndim: int, in_place: bool) -> Tag:
    """Return the labels of a result with ``ndim`` axes, for operands that broadcast against one another."""
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
        if not in_place:  # the result takes the labels of a parameter rather than those of its mask
            full.sort(key=lambda place: not place[0].levers_of(place[1]))
        axes.append(join_axes(tracer, full, size, in_place))
    return Tag(tuple(axes))


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "max", "min", "any", "all", "prod", "argmax",
      "argmin", "logsumexp", "var_mean", "std_mean", "norm")  # fmt: skip
def _reduce(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x: Tensor = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):  # max(x, y) of two tensors is pointwise
        return pointwise(tracer, func, args, kwargs, out)
    dims, keepdim = _reduced_dims(func, args, kwargs, x.dim())
    single = schema_name(func) == "aten::mean" and len(dims) == 1
    if single and tracer.calls and not has_labels(tracer.tag(x).axes[dims[0]]):
        tracer.facts.means.add((tracer.calls[-1][0], dims[0] - x.dim()))
    if not single or not normalise(tracer, x, dims[0]):
        hint = " (residual=True may gate it)" if schema_name(func) == "aten::mean" and not tracer.residual else ""
        before = tracer.tag(x)
        tag = join_parts(tracer.ledger, before, dims)
        tracer.put(x, tag)  # every later reader must take the parts as this operation does
        summed = schema_name(func) == "aten::sum" and not tag.static
        left = [d for d in dims if not (summed and close_at_birth(tracer, before.levers_of(d)))]
        tracer.freeze_axes(tag, f"reduced over its channels by {schema_name(func)}{hint}", left)
    else:
        tag = tracer.tag(x)
    tag = tracer.ledger.settle(tag)
    axes = [() if d in dims else a for d, a in enumerate(tag.axes)]
    if not keepdim:
        axes = [a for d, a in enumerate(axes) if d not in dims]
    for o in tensors_in(out):
        if o.dim() == len(axes):
            result = Tag(tuple(axes), static=tag.static)
            tracer.put(o, follow(tracer.ledger, tag, result) if schema_name(func) in _ZERO_OF_ZEROS else result)


_ZERO_OF_ZEROS = {f"aten::{name}" for name in ("sum", "mean", "amax", "amin", "max", "min", "prod")}


def _reduced_dims(func: Any, args: Any, kwargs: Any, ndim: int) -> tuple[list[int], bool]:
    """Return the dimensions that an operation reduces, counted from the front, and whether it keeps them."""
    bound: dict[str, Any] = {}
    for i, parameter in enumerate(schema_arguments(func)):
        bound[parameter.name] = args[i] if i < len(args) else kwargs.get(parameter.name, parameter.default_value)
    dim = bound.get("dim")
    if dim is None or dim == []:
        return list(range(ndim)), bool(bound.get("keepdim", False))
    return [dim_of(d, ndim) for d in (dim if isinstance(dim, list | tuple) else [dim])], bool(
        bound.get("keepdim", False)
    )


@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod")
def _softmax(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = dim_of(args[1], out.dim())
    tag = tracer.ledger.settle(join_parts(tracer.ledger, tracer.tag(args[0]), [dim]))
    tracer.freeze_axes(tag, f"normalised over its channels by {schema_name(func)}", [dim])
    tracer.put(out, Tag(tag.axes, static=tag.static))


@rule("flip", "roll")
def _reorder(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Freeze the axes along which entries change places; elsewhere labels stay as they are."""
    dims = [dim_of(d, out.dim()) for d in (args[-1] if isinstance(args[-1], list | tuple) else [args[-1]])]
    tracer.freeze(args[0], f"reordered over its channels by {schema_name(func)}", dims)
    tag = tracer.ledger.settle(tracer.tag(args[0]))
    tracer.put(out, Tag(tuple(plain(out.shape[d]) if d in dims else a for d, a in enumerate(tag.axes))))


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
      "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_nearest3d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
      "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def _spatial(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Keep the labels of the leading axes: the operation mixes trailing axes, for each channel by itself."""
    tag = tracer.ledger.settle(tracer.tag(args[0]))
    trailing = 3 if "3d" in schema_name(func) else 1 if "1d" in schema_name(func) else 2
    leading = len(tag.axes) - trailing
    tracer.freeze(args[0], f"mixed over its channels by {schema_name(func)}", range(leading, len(tag.axes)))
    for o in tensors_in(out):
        tracer.put(o, Tag((*tag.axes[:leading], *map(plain, o.shape[leading:]))))


@rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty",
      "empty_like", "new_empty", "empty_strided", "new_empty_strided", "scalar_tensor")  # fmt: skip
def _constant(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Mark all axes as having equal entries, any subset of which will do; dropout fills such a tensor with noise."""
    tracer.put(out, Tag(tuple(plain(n, Mark.SAME) for n in out.shape), blank=True))


@rule("rand", "randn", "randint")
def _draw(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Mark all axes like those with equal entries, since any subset of draws will do as well."""
    tracer.put(out, Tag(tuple(plain(n, Mark.SAME) for n in out.shape)))


@rule("_local_scalar_dense", "item", "equal", "_assert_async", "_assert_scalar", "_is_all_true")
def _value(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Freeze a tensor of which a value is read, because the value can steer anything."""
    tracer.facts.steered = True
    for t in tensors_in(args, kwargs):
        tracer.freeze(t, f"its value is read by {schema_name(func)}")


@layout("index", "index_select", "gather")
def _index(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Freeze the axes that are indexed; the others keep their labels where the layout of the result is simple."""
    x: Tensor = args[0]
    tag = tracer.ledger.settle(tracer.tag(x))
    if schema_name(func) == "aten::index":
        indices = [*args[1], *[None] * (x.dim() - len(args[1]))]
        hit = [d for d, i in enumerate(indices) if i is not None]
        plain_layout = len(hit) == 1 and indices[hit[0]].dim() == 1 and indices[hit[0]].dtype != torch.bool
    else:
        hit, plain_layout = [dim_of(args[1], x.dim())], schema_name(func) == "aten::index_select"
    tracer.freeze(x, "indexed by position", hit)
    for t in tensors_in(args[1:]):
        tracer.freeze(t, "used as an index")
    if plain_layout:
        tracer.put(out, tag.with_axis(hit[0], plain(out.shape[hit[0]])))
    elif hit == [0] and len(out.shape) >= x.dim() - 1 and schema_name(func) == "aten::index":
        lead = out.dim() - (x.dim() - 1)
        tracer.put(out, Tag((*map(plain, out.shape[:lead]), *tag.axes[1:])))
    else:
        tracer.freeze(x, "indexed by position")
