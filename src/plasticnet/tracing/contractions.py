"""Has the rules for operations that multiply and sum: linear maps, convolutions, normalisation and embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from plasticnet.tracing.labels import Axis, Mark, Tag, labelled, plain
from plasticnet.tracing.mode import Tracer, rule
from plasticnet.tracing.statistics import normalise


def _matmul(tracer: Tracer, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Move the labels of ``out[i, j] = sum_c a[i, c] b[c, j]``, where either operand may be the weight."""
    row, column = tracer.tag(a).axes[0], None
    if tracer.tag(a).source is not None and tracer.tag(b).source is None:
        tracer.contract(b, 0, a, 1, out.numel() / max(a.shape[0], 1))
        row = tracer.produce(a, 0)
    else:
        tracer.contract(a, 1, b, 0, out.numel() / max(b.shape[1], 1))
        column = tracer.produce(b, 1)
    tracer.put(out, Tag((row, tracer.tag(b).axes[1] if column is None else column)))


@rule("mm")
def _mm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    _matmul(tracer, args[0], args[1], out)


@rule("addmm", "_addmm_activation")
def _addmm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    bias, a, b = args[:3]
    _matmul(tracer, a, b, out)
    tag = tracer.tag(out)
    if bias.dim() == 2:
        tracer.meet(tracer.ledger.read(tag, 0), tracer.ledger.read(tracer.tag(bias), 0), "added to a product")
    if bias.shape[-1] == out.shape[-1]:
        tracer.attach(tracer.ledger.read(tag, 1), bias, "a bias without units", bias.dim() - 1)
    else:
        tracer.freeze(bias, "one channel broadcast over many")


@rule("mv", "addmv")
def _mv(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    matrix, vector = args[-2:]
    if tracer.tag(matrix).source is not None:
        tracer.contract(vector, 0, matrix, 1, 1)
        axis = tracer.produce(matrix, 0)
    else:
        tracer.contract(matrix, 1, vector, 0, out.numel())
        axis = tracer.tag(matrix).axes[0]
    tracer.put(out, Tag((axis,)))
    if len(args) == 3:
        tracer.attach(tracer.ledger.read(tracer.tag(out), 0), args[0], "a bias without units")


@rule("dot")
def _dot(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    if tracer.tag(args[0]).source is not None:
        tracer.contract(args[1], 0, args[0], 0, 1)
    else:
        tracer.contract(args[0], 0, args[1], 0, 1)


@rule("linear")
def _linear(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    x, weight = args[:2]
    tracer.contract(x, x.dim() - 1, weight, 1, out.numel() / max(weight.shape[0], 1))
    tracer.put(out, Tag((*tracer.tag(x).axes[:-1], tracer.produce(weight, 0))))
    if len(args) > 2:
        tracer.attach(tracer.ledger.read(tracer.tag(out), out.dim() - 1), args[2], "a bias without units")


def _single(tracer: Tracer, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Move the labels of a single product with a weight in a stack, which is how einsum writes a linear map."""
    row, column = tracer.tag(a).axes[1], tracer.tag(b).axes[2]
    if tracer.tag(b).source is not None:
        tracer.contract(a, 2, b, 1, out.numel() / max(b.shape[2], 1))
        column = tracer.produce(b, 2)
    else:
        tracer.contract(b, 1, a, 2, out.numel() / max(a.shape[1], 1))
        row = tracer.produce(a, 1)
    tracer.put(out, Tag((tracer.ledger.settle(tracer.tag(a)).axes[0], row, column)))


@rule("bmm", "baddbmm")
def _bmm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Join the stacks of two stacks of matrices, which ties attention heads, and freeze the axis of the sum."""
    a, b = args[-2:]
    if len(args) == 3:
        tracer.freeze(args[0], "added to a product of two activations")
    if a.shape[0] == 1 and (tracer.tag(a).source is None) != (tracer.tag(b).source is None):
        return _single(tracer, a, b, out)
    ta, tb = tracer.ledger.settle(tracer.tag(a)), tracer.ledger.settle(tracer.tag(b))
    tracer.meet(tracer.ledger.read(ta, 0), tracer.ledger.read(tb, 0), "a stack of products with something fixed")
    for t, axis in ((ta, 2), (tb, 1)):
        tracer.ledger.freeze(tracer.ledger.read(t, axis), "a product of two activations or of two weights")
    tracer.put(out, Tag((ta.axes[0], ta.axes[1], tb.axes[2])))


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
        tracer.contract(x, channel, weight, into, positions)
        axis = tracer.produce(weight, born)
    else:
        axis = _grouped(tracer, x, channel, weight, groups, transposed, positions)
    if weight.dim() > 2:
        tracer.freeze(weight, "a kernel's extent", range(2, weight.dim()))
    spatial = map(plain, out.shape[channel + 1 :])
    tracer.put(out, Tag((*tracer.ledger.settle(tracer.tag(x)).axes[:channel], axis, *spatial)))
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
    if weight_tag.source is None:
        tracer.freeze(x, "a grouped convolution with a computed weight", [channel])
        tracer.freeze(weight, "a grouped convolution with a computed weight")
        return plain(weight.shape[1] * groups if transposed else weight.shape[0])
    if tracer.count:
        uses = tracer.facts.uses
        uses[weight_tag.source] = uses.get(weight_tag.source, 0.0) + positions / (tracer.batch or 1)
    rows = ledger.read(weight_tag, 0)
    tracer.facts.grouped[weight_tag.source] = len(rows) // groups
    ledger.freeze(ledger.read(weight_tag, 1), "the inside of a group")
    for x_group, row_group in zip(labels.reshape(groups, -1), rows.reshape(groups, -1), strict=True):
        if (x_group < 0).any():
            ledger.freeze(row_group, "a group that reads something that cannot be cut")
            ledger.freeze(x_group, "a group that reads something that cannot be cut")
        else:
            ledger.join_all(np.concatenate([x_group, row_group]))
    if not transposed:
        return tracer.produce(weight, 0)
    inside = weight.shape[1]
    tracer.facts.producers.setdefault((weight_tag.source, 0))
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
    if groups > 1 or not normalise(tracer, x, 1, weight):
        source = None if weight is None else tracer.tag(weight).source
        if source is not None:
            tracer.facts.grouped[source] = channels // groups
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
    if len(shape) == 1 and vectors and normalise(tracer, x, x.dim() - 1, vectors[0]):
        for vector in vectors[1:]:
            tracer.attach(tracer.ledger.read(tag, x.dim() - 1), vector, "a normalisation vector without units")
    else:
        hint = "by a norm without a vector of its own that tells channels apart" if tracer.residual else ""
        reason = f"{_NORMALISED} {hint}" if hint else f"{_NORMALISED}; residual=True gates it"
        for tensor in (x, *vectors):
            tracer.freeze(tensor, reason, range(tensor.dim() - len(shape), tensor.dim()))
    tracer.put(out[0], Tag(tag.axes))


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Join the rows of a direction with their lengths, and freeze the dimensions that a length is taken over."""
    direction, length = args[:2]
    dim = args[2] if len(args) > 2 else 0
    tag = tracer.ledger.settle(tracer.tag(direction))
    others = [d for d in range(direction.dim()) if d != dim % direction.dim()]
    tracer.freeze(direction, "a weight whose length is fixed by weight_norm", others)
    labels = tracer.ledger.read(tag, dim)
    tracer.attach(labels, length, "a length without units", dim)
    for o in out if isinstance(out, tuple) else (out,):
        if o.shape == direction.shape:
            tracer.put(o, Tag(tag.axes))


@rule("embedding")
def _embedding(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    table, index = args[:2]
    tracer.freeze(table, "the vocabulary of an embedding", [0])
    batch = tracer.tag(index).axes
    lead = [a if any(f.mark is Mark.BATCH for f in a) else plain(n) for a, n in zip(batch, index.shape, strict=True)]
    source = tracer.tag(table).source
    if source is not None and not tracer.residual:
        tracer.facts.embeddings.add(source)
    tracer.put(out, Tag((*lead, tracer.produce(table, 1))))
