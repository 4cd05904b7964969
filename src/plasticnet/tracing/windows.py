"""Has the rules for operations that read places in space, for each channel by itself: windows, grids and boxes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plasticnet.tools.torch_private import schema_name
from plasticnet.tracing.labels import Axis, Factor, Tag, is_same, plain
from plasticnet.tracing.layout import reshape
from plasticnet.tracing.mode import RULES, Tracer, rule
from plasticnet.tracing.views import dim_of, join_axes, tensors_in


def _mixed(tracer: Tracer, func: Any, x: Tensor, channel: int) -> tuple[Axis, ...]:
    """Freeze the axes behind the channels, and return those up to the channels."""
    tracer.freeze(x, f"mixed over its channels by {schema_name(func)}", range(channel + 1, x.dim()))
    return tracer.ledger.settle(tracer.tag(x)).axes[: channel + 1]


@rule("unfold")
def _unfold(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Cut windows along one axis, whose entries get a new axis at the end."""
    x: Tensor = args[0]
    dims = [dim_of(args[1], x.dim())] if x.dim() else []
    tracer.freeze(x, "cut into windows over its channels", dims)
    tag = tracer.ledger.settle(tracer.tag(x))
    axes = [plain(n) if d in dims else a for d, (a, n) in enumerate(zip(tag.axes, out.shape, strict=False))]
    tracer.put(out, Tag((*axes, *map(plain, out.shape[x.dim() :]))))


@rule("im2col")
def _im2col(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Put the channels and the places of a window into one axis, the channels outermost."""
    x: Tensor = args[0]
    *lead, channels = _mixed(tracer, func, x, x.dim() - 3)
    window = out.shape[-2] // max(x.shape[-3], 1)
    tracer.put(out, Tag((*lead, (*channels, Factor(window)), plain(out.shape[-1]))))


@rule("col2im")
def _col2im(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Take the channels and the places of a window apart again, and sum over the places."""
    x: Tensor = args[0]
    lead = _by_window(tracer, func, x, x.dim() - 2, out.shape[-3])
    tracer.put(out, Tag((*lead, *map(plain, out.shape[-2:]))))


def _by_window(tracer: Tracer, func: Any, x: Tensor, axis: int, channels: int) -> tuple[Axis, ...]:
    """Take an axis apart that has channels outermost and then the places of a window, and freeze what is behind them.

    Args:
        tracer: The tracer.
        func: The operation.
        x: The tensor.
        axis: The axis.
        channels: The number of channels.

    Returns:
        The axes up to the channels.
    """
    shape = (*x.shape[:axis], channels, x.shape[axis] // max(channels, 1), *x.shape[axis + 1 :])
    tag = tracer.ledger.settle(reshape(tracer.ledger, tracer.tag(x), shape))
    tracer.freeze_axes(tag, f"mixed over its channels by {schema_name(func)}", range(axis + 1, len(tag.axes)))
    return tag.axes[: axis + 1]


@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def _grid_sampler(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Read every channel at the places that a grid names."""
    lead = _mixed(tracer, func, args[0], 1)
    tracer.freeze(args[1], "used as coordinates")
    tracer.put(out, Tag((*lead, *map(plain, out.shape[2:]))))


@rule("max_unpool2d", "max_unpool3d")
def _max_unpool(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Write every channel to the places that it was pooled from."""
    x, index = args[:2]
    channel = x.dim() - (3 if "2d" in schema_name(func) else 4)
    (*lead, channels), (*_, places) = (_mixed(tracer, func, t, channel) for t in (x, index))
    tracer.meet(
        tracer.ledger.read(Tag((channels,)), 0), tracer.ledger.read(Tag((places,)), 0),
        "an index that may differ between its channels, and is not cut with them",
    )  # fmt: skip
    tracer.put(out, Tag((*lead, channels, *map(plain, out.shape[channel + 1 :]))))


@rule("_cdist_forward", "_euclidean_dist")
def _distance(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Sum the distances between two sets of rows over the channels, which freezes these."""
    a, b = args[:2]
    for x in (a, b):
        tracer.freeze(x, "summed over its channels in a distance between two activations", [x.dim() - 1])
        if x.shape[:-2] != out.shape[:-2]:
            tracer.freeze(x, "one stack of rows that is compared with many", range(x.dim() - 2))
    ta, tb = (tracer.ledger.settle(tracer.tag(x)) for x in (a, b))
    stacks = [t for t, x in ((ta, a), (tb, b)) if x.shape[:-2] == out.shape[:-2]]
    lead = [join_axes(tracer, [(t, d) for t in stacks], n) for d, n in enumerate(out.shape[:-2])]
    tracer.put(out, Tag((*lead, ta.axes[-2], tb.axes[-2])))


# -- torchvision, whose operations are known by their names alone -----------------------------


@rule("torchvision::roi_align", "torchvision::roi_pool")
def _roi(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Read every channel within boxes, each of which becomes a row."""
    _, channels = _mixed(tracer, func, args[0], 1)
    tracer.freeze(args[1], "used as boxes")
    for o in tensors_in(out):
        tracer.put(o, Tag((plain(o.shape[0]), channels, *map(plain, o.shape[2:]))))


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def _ps_roi(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Read every channel within its own cell of each box; as many channels as there are cells make up one."""
    tracer.freeze(args[1], "used as boxes")
    _, channels = _by_window(tracer, func, args[0], 1, out[0].shape[1])
    tracer.put(out[0], Tag((plain(out[0].shape[0]), channels, *map(plain, out[0].shape[2:]))))


@rule("torchvision::deform_conv2d")
def _deform_conv2d(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Do what the rule of a convolution does; each group of offsets must keep as many channels as the others."""
    x, weight, offset, mask, bias = args[:5]
    groups, offset_groups = args[11:13]
    for t in (offset, mask):
        tracer.freeze(t, "used as the offsets or the mask of a deformable convolution")
    labels = tracer.ledger.read(tracer.tag(x), 1).reshape(offset_groups, -1)
    for row in labels[1:]:
        tracer.meet(labels[0], row, "a group of offsets with something that cannot be cut")
    bias = None if is_same(tracer.tag(bias).axes[0]) else bias  # torchvision adds zeros where there is none
    RULES["aten::convolution"](tracer, func, (x, weight, bias, None, None, None, False, None, groups), {}, out)
