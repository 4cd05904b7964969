"""Has the rules for operations that work entry by entry, reduce, pool or index. Without a rule, labels are frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plasticnet.tools.torch_private import base_of, bound_arguments, schema_name
from plasticnet.tracing.labels import Axis, Mark, Tag, axis_size, has_labels, plain
from plasticnet.tracing.layout import join_parts
from plasticnet.tracing.levers import follow, layout, pointwise_levers
from plasticnet.tracing.mode import Tracer, rule
from plasticnet.tracing.readers import close_at_birth
from plasticnet.tracing.statistics import STATISTICS, normalised
from plasticnet.tracing.views import dim_of, join_axes, tensors_in
from plasticnet.tracing.writes import write


@rule("pointwise", "hardswish", "hardswish_", "_prelu_kernel", "copy_", "log_sigmoid_forward", "masked_fill",
      "masked_fill_", "where", "lerp", "addcmul", "addcdiv", "_to_copy", "native_dropout", "clamp", "fill_", "zero_",
      "bernoulli", "bernoulli_", "uniform_", "normal_", "exponential_", "log_normal_", "cauchy_", "geometric_",
      "random_", "rand_like", "randn_like", "randint_like", "celu", "clone", "complex", "polar", "mish_", "threshold_",
      "rrelu_with_noise", "rrelu_with_noise_",
      # What torch 2.8 does not call pointwise, and newer versions do:
      "celu_", "elu_", "hardsigmoid_", "hardtanh_", "ldexp", "leaky_relu", "leaky_relu_", "selu_")  # fmt: skip
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
        part = in_place and base_of(operands[0]) is not None
        result = _broadcast(tracer, operands, tags, results[0].dim() if results else 0, part)
    result = pointwise_levers(tracer, func, args, kwargs, operands, result)
    for r in results:
        if r.dim() == len(result.axes):
            tracer.put(r, result)


def _broadcast(tracer: Tracer, operands: list[Tensor], tags: list[Tag], ndim: int, part: bool) -> Tag:
    """Return the labels of a result with ``ndim`` axes, for operands that broadcast against one another.

    Args:
        tracer: The tracer.
        operands: The operands.
        tags: The labels of each of them.
        ndim: The number of axes of the result.
        part: Whether the result is written into the first operand, which is a view of another tensor.
    """
    if any(t.labelled for t in tags):
        tags = [tracer.ledger.settle(t) for t in tags]
    constant = tracer.constants.among(operands)
    beside = (constant,) if constant else ()
    axes: list[Axis] = []
    for i in range(-ndim, 0):
        here = [(t, len(t.axes) + i) for t in tags if len(t.axes) >= -i]
        size = max((axis_size(t.axes[a]) for t, a in here), default=1)
        full = [(t, a) for t, a in here if axis_size(t.axes[a]) == size]
        for t, a in here:
            if axis_size(t.axes[a]) != size and has_labels(t.axes[a]):
                tracer.ledger.freeze(tracer.ledger.read(t, a), "one channel broadcast over many")
        if not part:  # the result takes the labels of a parameter rather than those of its mask
            full.sort(key=lambda place: not place[0].levers_of(place[1]))
        axes.append(join_axes(tracer, full, size, part, *beside))
    return Tag(tuple(axes))


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "max", "min", "any", "all", "prod", "argmax",
      "argmin", "logsumexp", "var_mean", "std_mean", "norm", "median", "nanmedian", "mode", "kthvalue",
      "nansum", "count_nonzero")  # fmt: skip
def _reduce(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x: Tensor = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):  # max(x, y) of two tensors is pointwise
        return pointwise(tracer, func, args, kwargs, out)
    dims, keepdim = _reduced_dims(func, args, kwargs, x.dim())
    if not normalised(tracer, func, args, kwargs, dims):
        maybe = not tracer.residual and schema_name(func).removeprefix("aten::") in STATISTICS
        hint = " (residual=True may gate it)" if maybe else ""
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
    bound = bound_arguments(func, args, kwargs)
    dim, keepdim = bound.get("dim"), bool(bound.get("keepdim", False))
    if dim is None or dim == []:
        return list(range(ndim)), keepdim
    return [dim_of(d, ndim) for d in (dim if isinstance(dim, list | tuple) else [dim])], keepdim


@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax")
def _softmax(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    _along(tracer, func, args, kwargs, out, "normalised")


@rule("cumsum", "cumsum_", "cumprod", "cumprod_", "cummax", "cummin", "logcumsumexp")
def _accumulate(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    _along(tracer, func, args, kwargs, out, "accumulated")


@layout("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _fourier(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Keep the labels of the axes that are not transformed, where the transform of zeros is zeros."""
    _along(tracer, func, args, kwargs, out, "transformed")


@rule("sort", "argsort", "topk")
def _sort(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Keep the labels of the other axes, also on the places that the sorted entries had: each channel has its own."""
    tracer.facts.sorting = True
    _along(tracer, func, args, kwargs, out, "sorted")


def _along(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any, what: str) -> None:
    """Freeze the axes along which entries depend on one another; the others keep their labels.

    Args:
        tracer: The tracer.
        func: The operation, which has an argument "dim", one dimension or a list of them.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its result, of which every tensor gets the labels.
        what: What happens along the axes, for people to read.
    """
    x: Tensor = args[0]
    asked = bound_arguments(func, args, kwargs)["dim"]
    dims = [dim_of(d, x.dim()) for d in (asked if isinstance(asked, list | tuple) else [asked])] if x.dim() else []
    tag = tracer.ledger.settle(join_parts(tracer.ledger, tracer.tag(x), dims))
    tracer.freeze_axes(tag, f"{what} over its channels by {schema_name(func)}", dims)
    for o in tensors_in(out):
        axes = tuple(plain(n) if d in dims else tag.axes[d] for d, n in enumerate(o.shape))
        tracer.put(o, Tag(axes, static=tag.static))


@rule("flip", "roll")
def _reorder(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Freeze the axes along which entries change places; elsewhere labels stay as they are."""
    asked = bound_arguments(func, args, kwargs)["dims"]
    dims = [dim_of(d, out.dim()) for d in asked] or list(range(out.dim()))  # without dims, roll flattens the tensor
    tracer.freeze(args[0], f"reordered over its channels by {schema_name(func)}", dims)
    tag = tracer.ledger.settle(tracer.tag(args[0]))
    tracer.put(out, Tag(tuple(plain(out.shape[d]) if d in dims else a for d, a in enumerate(tag.axes))))


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
      "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_nearest3d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
      "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
      "_upsample_nearest_exact1d", "_upsample_nearest_exact3d", "_adaptive_avg_pool1d", "fractional_max_pool2d",
      "fractional_max_pool3d")  # fmt: skip
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
