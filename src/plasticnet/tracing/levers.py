"""Follows where gates can act on computed tensors: weights that are masked, scaled or rounded before they are used.

A gate is multiplied into parameters. It closes a unit in a computed tensor if zeros in these parameters make zeros
there. Each axis of a `Tag` has levers, which say in what dimensions of parameters these zeros are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from plasticnet.tools.torch_private import schema_name
from plasticnet.tracing.labels import NO_LEVERS, Axis, Ledger, Levers, Tag, axis_size, is_same
from plasticnet.tracing.mode import Rule, Tracer, rule

# Results that are zero where all operands are zero, and where the first one is.
_ALL = {"add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin"}
_FIRST = {"div", "true_divide", "masked_fill", "native_dropout", "dropout", "_to_copy", "clone"}


def follow(ledger: Ledger, before: Tag, after: Tag) -> Tag:
    """Return labels with the levers that a tensor has after its entries were laid out anew, picked or repeated.

    Args:
        ledger: The ledger.
        before: The labels and the levers that the tensor had.
        after: The labels that it has now.
    """
    if after.levers or not (before.static or any(before.levers)):
        return after
    old = [(axis, own) for axis, own in zip(before.axes, before.levers, strict=False) if own]
    levers = tuple(NO_LEVERS.union(*(_left(ledger, a, own, axis) for a, own in old)) for axis in after.axes)
    return Tag(after.axes, levers, before.static, after.blank)


def _left(ledger: Ledger, old: Axis, levers: Levers, axis: Axis) -> Levers:
    """Return which levers of an old axis an axis has that was made of it.

    Where the old one was flattened from two with levers, each must keep its own. They are told apart by the labels,
    which only parameters have that were not combined with others.
    """
    if not _shares(old, axis):
        return NO_LEVERS
    if len({id(f.grid) for f in old if f.grid is not None}) == 1:
        return levers
    origins = {o for f in old if f.grid is not None for o in ledger.origins_of(f.grid.labels)}
    here = {o for f in axis if f.grid is not None for o in ledger.origins_of(f.grid.labels)}
    return levers & here if levers <= origins else NO_LEVERS


def _shares(a: Axis, b: Axis) -> bool:
    """Return whether two axes have labels in common."""
    one, other = ([f.grid for f in axis if f.grid is not None] for axis in (a, b))
    return any(g is h or len(np.intersect1d(g.known, h.known, assume_unique=True)) for g, h in product(one, other))


def layout(*names: str) -> Callable[[Rule], Rule]:
    """Return what `rule` does, for operations that only lay out entries of their first tensor, so that levers stay."""

    def register(function: Rule) -> Rule:
        @wraps(function)
        def moving(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
            before = tracer.tags.get(args[0]) or tracer.tag(
                args[0]
            )  # some operations change the axes of a tensor itself
            function(tracer, func, args, kwargs, out)
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    tracer.put(t, follow(tracer.ledger, before, tracer.tag(t)))

        rule(*names)(moving)
        return function

    return register


def together(tracer: Tracer, places: Sequence[tuple[Tag, int]], size: int) -> Levers:
    """Return the levers of an axis along which the entries of several tensors are added, or lie beside one another.

    Args:
        tracer: The tracer.
        places: The labels of each tensor, and the place of its axis.
        size: The length of the axis, or -1 where it may have any.
    """
    found = [tag.levers_of(axis) for tag, axis in places]
    fits = all(size in (-1, axis_size(tag.axes[axis])) for tag, axis in places)
    return NO_LEVERS.union(*found) if fits and all(found) else NO_LEVERS


def pointwise_levers(tracer: Tracer, func: Any, args: Any, kwargs: Any, operands: Sequence[Tensor], result: Tag) -> Tag:
    """Return the labels of the result of a pointwise operation with its levers.

    Args:
        tracer: The tracer.
        func: The operation.
        args: Its arguments.
        kwargs: Its keyword arguments.
        operands: The tensors among them, as they were before the operation.
        result: The labels of the result.
    """
    tags = [tracer.tag(t) for t in operands]
    static = all(tag.static or tag.blank or tracer.tags.get(t) is None for tag, t in zip(tags, operands, strict=True))
    if not any(own for tag in tags for own in tag.levers):
        return Tag(result.axes, (), static, result.blank)
    ndim = len(result.axes)
    levers = [NO_LEVERS] * ndim
    name = schema_name(func).removeprefix("aten::").removesuffix("_")
    for i in range(-ndim, 0):
        size = axis_size(result.axes[i])
        places = [(tag, len(tag.axes) + i) for tag in tags if len(tag.axes) >= -i]
        places = [(tag, a) for tag, a in places if axis_size(tag.axes[a]) == size]
        if name == "mul":
            levers[i] = next((found for tag, a in places if (found := tag.levers_of(a))), NO_LEVERS)
        elif name in _FIRST:
            fills = name == "masked_fill" and (isinstance(args[2], Tensor) or args[2] != 0)
            if args[0] is operands[0] and not fills:
                levers[i] = next((tag.levers_of(a) for tag, a in places if tag is tags[0]), NO_LEVERS)
        elif name == "where" or (name in _ALL and len(tags) > 1):
            added = [
                tag for tag, t in zip(tags[name == "where" :], operands[name == "where" :], strict=True)
                if not _is_zero(tag, t)
            ]  # fmt: skip
            if all(len(tag.axes) >= -i for tag in added):
                levers[i] = together(tracer, [(tag, len(tag.axes) + i) for tag in added], size)
        elif len(tags) == 1 and name not in _ALL and any(tags[0].levers) and _keeps_zero(func, args, kwargs):
            levers[i] = tags[0].levers_of(i)
    return Tag(result.axes, tuple(levers), static, result.blank)


def _is_zero(tag: Tag, t: Tensor) -> bool:
    """Return whether all entries of a tensor are zero because the model made it so."""
    made = tag.blank and all(is_same(a) or axis_size(a) == 1 for a in tag.axes)
    return made and not t.is_meta and not bool(t.count_nonzero())


def _keeps_zero(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operation on a single tensor makes zeros of zeros."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False

    def zero(value: Any) -> Any:
        return torch.zeros((), dtype=value.dtype) if isinstance(value, Tensor) else value

    try:
        found = tree_leaves(func(*tree_map(zero, args), **tree_map(zero, kwargs)))
        return all(not bool(t.count_nonzero()) for t in found if isinstance(t, Tensor))
    except Exception:  # an operation may refuse a tensor without axes
        return False
