"""Has the rules for products of stacks of matrices, of which one may be a stack of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from plasticnet.tracing.labels import NO_LEVERS, Axis, Tag
from plasticnet.tracing.mode import Tracer, rule
from plasticnet.tracing.readers import contract, pair
from plasticnet.tracing.views import join_axes, tensors_in


def _stacked(tracer: Tracer, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Move the labels of products with a stack of weights, such as the members of an ensemble, or with a single one.

    Einsum writes a linear map as a stack of one. All members have the same hidden units, because one tensor holds them.
    """
    ta, tb = tracer.tag(a), tracer.tag(b)
    left = ta.static  # whether the weights are on the left
    row, column = ta.axes[1], tb.axes[2]
    if left:
        contract(tracer, b, 1, a, 2, out.numel() / max(a.shape[0] * a.shape[1], 1))
        row = tracer.produce(a, 1)
    else:
        contract(tracer, a, 2, b, 1, out.numel() / max(b.shape[0] * b.shape[2], 1))
        column = tracer.produce(b, 2)
    ta, tb = tracer.ledger.settle(ta), tracer.ledger.settle(tb)
    if a.shape[0] > 1:
        members, own = (ta, tb) if left else (tb, ta)
        tracer.meet(tracer.ledger.read(members, 0), tracer.ledger.read(own, 0), "the members of a stack of weights")
    stack = (tb if left else ta).axes[0]
    tracer.put(out, Tag((stack, row, column), (NO_LEVERS, ta.levers_of(1), tb.levers_of(2))))


@rule("bmm", "baddbmm")
def _bmm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Join the stacks of two stacks of matrices, which ties attention heads, and the axes that are summed over."""
    a, b = args[-2:]
    if tracer.tag(a).static != tracer.tag(b).static:
        _stacked(tracer, a, b, out)
    else:
        ta, tb = tracer.ledger.settle(tracer.tag(a)), tracer.ledger.settle(tracer.tag(b))
        stack = _stack(tracer, ta.axes[0], tb.axes[0])
        pair(tracer, a, 2, b, 1)
        _tie_sizes(tracer, tracer.ledger.read(ta, 2), tb)
        levers = (ta.levers_of(0) or tb.levers_of(0), ta.levers_of(1), tb.levers_of(2))
        tracer.put(out, Tag((stack, ta.axes[1], tb.axes[2]), levers))
    if len(args) == 3:
        _added(tracer, args[0], out)


def _tie_sizes(tracer: Tracer, summed: np.ndarray, right: Tag) -> None:
    """Join the dimensions of values with those of the queries before, where the dimensions of heads are units.

    Most code has one number for both. Where there are not as many, they stay apart.

    Args:
        tracer: The tracer.
        summed: The labels that are summed over.
        right: The labels of the right operand.
    """
    if tracer.ledger.by_dimension(summed):
        tracer.dimensions = summed
    elif tracer.dimensions is not None:
        values = tracer.ledger.read(right, 2)
        if len(values) == len(tracer.dimensions) and tracer.ledger.by_dimension(values):
            tracer.ledger.join(tracer.dimensions, values)


def _stack(tracer: Tracer, a: Axis, b: Axis) -> Axis:
    """Join the stacks of two operands, and return that of the result.

    Factors are joined one by one where they are as long, because one may have equal entries, such as keys and values
    that several heads have in common.
    """
    if [f.size for f in a] != [f.size for f in b]:
        labels, others = (tracer.ledger.read(Tag((axis,)), 0) for axis in (a, b))
        tracer.meet(labels, others, "a stack of products with something fixed")
        return a
    pairs = [(Tag(((f,),)), Tag(((g,),))) for f, g in zip(a, b, strict=True)]
    joined = [join_axes(tracer, [(s, 0), (t, 0)], s.shape[0]) for s, t in pairs]
    return tuple(f for axis in joined for f in axis)


def _added(tracer: Tracer, bias: Tensor, out: Tensor) -> None:
    """Join the labels of what is added to a stack of products with those of the result, and take its levers away."""
    tag = tracer.ledger.settle(tracer.tag(out))
    added = tracer.ledger.settle(tracer.tag(bias))
    axes = list(tag.axes)
    for i in range(-bias.dim(), 0):
        if bias.shape[i] == out.shape[i]:
            places = [(tag, out.dim() + i), (added, bias.dim() + i)]
            axes[i] = join_axes(tracer, places, out.shape[i])
        else:
            tracer.freeze_axes(added, "one channel broadcast over many", [bias.dim() + i])
    levers = [NO_LEVERS] * out.dim()
    levers[-1] = tag.levers_of(-1) | added.levers_of(-1) if tag.levers_of(-1) and added.levers_of(-1) else NO_LEVERS
    tracer.put(out, Tag(tuple(axes), tuple(levers)))


@rule("_grouped_mm")
def _grouped(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Move the labels of products of some rows with one member of a stack, of others with the next, as for experts."""
    rows, stack = args[:2]
    if rows.dim() != 2 or stack.dim() != 3 or not tracer.tag(stack).static or any(a is not None for a in args[3:]):
        return tracer.unknown(func, [rows, stack, *tensors_in(args[3:])])
    contract(tracer, rows, 1, stack, 1, out.numel() / max(stack.shape[0] * stack.shape[2], 1))
    column = tracer.produce(stack, 2)
    tracer.freeze(stack, "the members of a stack of weights", [0])
    lead = tracer.ledger.settle(tracer.tag(rows)).axes[0]
    tracer.put(out, Tag((lead, column), (NO_LEVERS, tracer.tag(stack).levers_of(2))))
