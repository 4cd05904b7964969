"""Moves the labels of what is copied into a blank tensor, as where a model fills a tensor of zeros slice by slice."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from plasticnet.tools.torch_private import base_of
from plasticnet.tracing.labels import Axis, Tag, axis_size, has_labels, is_batch, is_same, labelled, plain
from plasticnet.tracing.mode import Tracer


def write(tracer: Tracer, target: Tensor, x: Tensor) -> bool:
    """Move the labels of a tensor that is copied into a blank one, or into a slice of a blank one.

    The whole blank tensor, as ``empty`` or ``zeros`` makes it, takes the labels at the places that are written.

    Args:
        tracer: The tracer.
        target: The tensor that is written to.
        x: The tensor that is copied.

    Returns:
        Whether the target is blank. If not, no label was moved.
    """
    base = base_of(target)
    base = target if base is None else base
    tag = tracer.tag(base)
    if not tag.blank or base.dim() != target.dim() or base.stride() != target.stride() or x.shape != target.shape:
        return False
    own = tracer.ledger.settle(tracer.tag(x))
    rest = int(target.storage_offset() - base.storage_offset())
    axes: list[Axis] = []
    for d, (size, stride) in enumerate(zip(base.shape, base.stride(), strict=True)):
        start, rest = divmod(rest, max(int(stride), 1))
        axes.append(_written(tracer, tag, own, d, slice(start, start + target.shape[d]), size))
    tracer.put(base, Tag(tuple(axes), blank=True))
    return True


def _written(tracer: Tracer, tag: Tag, own: Tag, d: int, place: slice, size: int) -> Axis:
    """Return an axis of a blank tensor after another tensor was copied into a slice of it.

    Args:
        tracer: The tracer.
        tag: The labels of the blank tensor.
        own: The labels of the tensor that is copied.
        d: The place of the axis.
        place: The slice of the axis that is written.
        size: The length of the axis.
    """
    before, after = tag.axes[d], own.axes[d]
    if axis_size(after) == size and is_same(before):
        return after
    if not has_labels(before) and not has_labels(after):
        return before if is_batch(before) and is_batch(after) else plain(size)
    labels, new = tracer.ledger.read(tag, d).copy(), tracer.ledger.read(own, d)
    if not is_same(before) and not has_labels(before):
        tracer.ledger.freeze(new, "written beside something that cannot be cut")
        return before
    tracer.ledger.join(labels[place], new)
    tracer.ledger.freeze(np.where(new < 0, labels[place], -1), "written over by something that cannot be cut")
    labels[place] = np.where(labels[place] < 0, new, labels[place])
    return labelled(labels)
