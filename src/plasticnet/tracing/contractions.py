"""Has the rules for operations that multiply and sum: linear maps, convolutions, normalisation and embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from plasticnet.tools.torch_private import schema_name
from plasticnet.tracing.labels import NO_LEVERS, Axis, Levers, Mark, Tag, labelled, plain
from plasticnet.tracing.mode import Tracer, rule
from plasticnet.tracing.readers import contract, count_uses, pair
from plasticnet.tracing.statistics import normalise


def _born(tracer: Tracer, weight: Tensor, axis: int, bias: Tensor | None = None) -> Levers:
    """Return the levers of an axis of a result: the rows of the weight, together with the entries of a bias."""
    rows = tracer.tag(weight).levers_of(axis)
    if bias is None:
        return rows
    added = tracer.tag(bias).levers_of(bias.dim() - 1) if bias.dim() else NO_LEVERS
    return rows | added if added and bias.shape[-1] == weight.shape[axis] else NO_LEVERS


def _matmul(tracer: Tracer, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Move the labels of ``out[i, j] = sum_c a[i, c] b[c, j]``, where either operand may be the weight."""
    ta, tb = tracer.tag(a), tracer.tag(b)
    row, column = ta.axes[0], tb.axes[1]
    levers = (NO_LEVERS if bias is not None else ta.levers_of(0), _born(tracer, b, 1, bias))
    if ta.static and not tb.static:
        contract(tracer, b, 0, a, 1, out.numel() / max(a.shape[0], 1))
        row = tracer.produce(a, 0)
    elif not ta.static and not tb.static:
        pair(tracer, a, 1, b, 0)
    else:
        contract(tracer, a, 1, b, 0, out.numel() / max(b.shape[1], 1))
        column = tracer.produce(b, 1, merging=ta.static)
        if ta.static and ta.levers_of(1):
            tracer.produce(a, 1, merging=True)
    tracer.put(out, Tag((row, column), levers, ta.static and tb.static))


@rule("mm")
def _mm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    _matmul(tracer, args[0], args[1], out)


@rule("addmm", "_addmm_activation")
def _addmm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    bias, a, b = args[:3]
    _matmul(tracer, a, b, out, bias)
    tag = tracer.tag(out)
    if bias.dim() == 2:
        tracer.meet(tracer.ledger.read(tag, 0), tracer.ledger.read(tracer.tag(bias), 0), "added to a product")
    if bias.shape[-1] == out.shape[-1]:
        tracer.attach(tracer.ledger.read(tag, 1), bias, "a bias without units", bias.dim() - 1)
    else:
        tracer.freeze(bias, "one channel broadcast over many")


_NUMBER = "summed over, for a number that depends on the whole weight (as in spectral_norm)"


@rule("mv", "addmv")
def _mv(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    matrix, vector = args[-2:]
    if tracer.tag(matrix).static and tracer.tag(vector).static:
        tracer.freeze(matrix, _NUMBER)
        tracer.freeze(vector, _NUMBER)
        return
    if tracer.tag(matrix).static:
        contract(tracer, vector, 0, matrix, 1, 1)
        axis = tracer.produce(matrix, 0)
    else:
        contract(tracer, matrix, 1, vector, 0, out.numel())
        axis = tracer.tag(matrix).axes[0]
    tracer.put(out, Tag((axis,)))
    if len(args) == 3:
        tracer.attach(tracer.ledger.read(tracer.tag(out), 0), args[0], "a bias without units")


@rule("dot", "vdot")
def _dot(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    if tracer.tag(args[0]).static and tracer.tag(args[1]).static:
        tracer.freeze(args[0], _NUMBER)
        tracer.freeze(args[1], _NUMBER)
    elif tracer.tag(args[0]).static:
        contract(tracer, args[1], 0, args[0], 0, 1)
    else:
        contract(tracer, args[0], 0, args[1], 0, 1)


@rule("linear")
def _linear(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    contract(tracer, x, x.dim() - 1, weight, 1, out.numel() / max(weight.shape[0], 1))
    levers = (*[NO_LEVERS] * (out.dim() - 1), _born(tracer, weight, 0, bias))
    tracer.put(out, Tag((*tracer.tag(x).axes[:-1], tracer.produce(weight, 0)), levers))
    tracer.attach(tracer.ledger.read(tracer.tag(out), out.dim() - 1), bias, "a bias without units")


@rule("convolution")
def _convolution(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, weight, bias, *_, transposed, _, groups = args[:9]
    into, born = (0, 1) if transposed else (1, 0)
    channel = x.dim() - (weight.dim() - 1)
    if not weight.numel():  # torch then returns as many channels as it likes
        for tensor in (x, weight, *([bias] if isinstance(bias, Tensor) else [])):
            tracer.freeze(tensor, "a convolution without weights")
        return
    counted = x if transposed else out
    positions = counted.numel() / counted.shape[channel]
    if groups == 1:
        contract(tracer, x, channel, weight, into, positions)
        axis = tracer.produce(weight, born)
    else:
        axis = _grouped(tracer, x, channel, weight, groups, transposed, positions)
    if weight.dim() > 2:
        tracer.freeze(weight, "a kernel's extent", range(2, weight.dim()))
    spatial = map(plain, out.shape[channel + 1 :])
    lead = tracer.ledger.settle(tracer.tag(x)).axes[:channel]
    levers = [NO_LEVERS] * out.dim()
    levers[channel] = _born(tracer, weight, born, bias) if groups == 1 or not transposed else NO_LEVERS
    tracer.put(out, Tag((*lead, axis, *spatial), tuple(levers)))
    tracer.attach(tracer.ledger.read(tracer.tag(out), channel), bias, "a bias without units")


def _grouped(
    tracer: Tracer, x: Tensor, channel: int, weight: Tensor, groups: int, transposed: bool, positions: float
) -> Axis:
    """Join the inputs and the outputs of every group, so that a whole group is one unit.

    The units that a group reads pass through it. So the convolution is no consumer: a gate here and another one at the
    next consumer would act twice.

    Returns:
        The axis of the output channels.
    """
    ledger = tracer.ledger
    labels = ledger.read(tracer.tag(x), channel)
    weight_tag = tracer.tag(weight)
    if not weight_tag.static:
        tracer.freeze(x, "a grouped convolution with a weight that follows from an activation", [channel])
        tracer.freeze(weight, "a grouped convolution with a weight that follows from an activation")
        return plain(weight.shape[1] * groups if transposed else weight.shape[0])
    count_uses(tracer, weight_tag, positions * weight.numel())
    rows = ledger.read(weight_tag, 0)
    grouped = weight_tag.levers_of(0) or ledger.origins_of(rows)
    tracer.facts.grouped.update((tensor, len(rows) // groups) for tensor, dim in grouped if dim == 0)
    ledger.freeze(ledger.read(weight_tag, 1), "the inside of a group")
    for x_group, row_group in zip(labels.reshape(groups, -1), rows.reshape(groups, -1), strict=True):
        if (x_group < 0).any():
            ledger.freeze(row_group, "a group that reads something that cannot be cut")
            ledger.freeze(x_group, "a group that reads something that cannot be cut")
        else:
            ledger.join_all(np.concatenate([x_group, row_group]))
    born = tracer.produce(weight, 0)
    if not transposed:
        return born
    inside = weight.shape[1]
    return labelled(np.repeat(rows.reshape(groups, -1)[:, 0], inside))


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm")  # fmt: skip
def _batch_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    tag = tracer.ledger.settle(tracer.tag(x))
    labels = tracer.ledger.read(tag, 1)
    for vector in args[1:5]:
        if isinstance(vector, Tensor):
            tracer.attach(labels, vector, "a normalisation vector without units")
    tracer.put(out[0], Tag(tag.axes))


@rule("native_group_norm")
def _group_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, weight, bias, _, channels, _, groups = args[:7]
    tag = tracer.ledger.settle(tracer.tag(x))
    labels = tracer.ledger.read(tag, 1)
    for vector in (weight, bias):
        tracer.attach(labels, vector, "a normalisation vector without units")
    if groups > 1 or not normalise(tracer, x, 1, schema_name(func), weight):
        counted = () if weight is None else tracer.tag(weight).levers_of(0)
        tracer.facts.grouped.update((tensor, channels // groups) for tensor, _ in counted)
        for group in labels.reshape(groups, channels // groups):
            if (group < 0).any():
                tracer.ledger.freeze(group, "a normalisation group with something that cannot be cut")
            tracer.ledger.join_all(group)
    tracer.put(out[0], Tag(tag.axes))


_NORMALISED = "normalised over its channels (LayerNorm or RMSNorm)"


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, shape = args[:2]
    tag = tracer.ledger.settle(tracer.tag(x))
    vectors = [vector for vector in args[2:4] if isinstance(vector, Tensor)]
    if len(shape) == 1 and vectors and normalise(tracer, x, x.dim() - 1, schema_name(func), vectors[0]):
        for vector in vectors[1:]:
            tracer.attach(tracer.ledger.read(tag, x.dim() - 1), vector, "a normalisation vector without units")
    else:
        hint = "by a norm without a vector of its own that tells channels apart" if tracer.residual else ""
        reason = f"{_NORMALISED} {hint}" if hint else f"{_NORMALISED}; residual=True gates it"
        for tensor in (x, *vectors):
            tracer.freeze(tensor, reason, range(tensor.dim() - len(shape), tensor.dim()))
    tracer.put(out[0], Tag(tag.axes))


@rule("embedding")
def _embedding(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    table, index = args[:2]
    tracer.freeze(table, "the vocabulary of an embedding", [0])
    batch = tracer.tag(index).axes
    lead = [a if any(f.mark is Mark.BATCH for f in a) else plain(n) for a, n in zip(batch, index.shape, strict=True)]
    found = tracer.facts.tables if tracer.residual else tracer.facts.embeddings
    found.update(tensor for tensor, _ in tracer.tag(table).levers_of(1))
    tracer.put(out, Tag((*lead, tracer.produce(table, 1))))
