"""Finds who reads units: the parameters through which a contraction sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import prod

import numpy as np
from torch import Tensor

from plasticnet.tools.torch_private import Conv
from plasticnet.tracing.labels import Axis, Levers, Tag, is_batch, is_same
from plasticnet.tracing.mode import Tracer
from plasticnet.units import Consumer, owner

_PRODUCT = "multiplied with an activation, or with a weight that is computed from one"
_PAIR = "a product of two activations, of which none is zero where a parameter is"
_FIXED = (
    "multiplied with something fixed, or with a weight that is computed so that closed columns would not be zeros, or "
    "would change others"
)


def contract(tracer: Tracer, x: Tensor, x_axis: int, weight: Tensor, w_axis: int, positions: float) -> None:
    """Join an axis of an activation and one of a weight that are summed over, which makes the weight a consumer.

    Where the weight is computed, its levers are the consumers.

    Args:
        tracer: The tracer.
        x: The activation.
        x_axis: Its axis.
        weight: The weight.
        w_axis: Its axis.
        positions: How often each entry of the weight is multiplied in this operation.
    """
    tx, tw = tracer.tag(x), tracer.tag(weight)
    labels, columns = tracer.ledger.read(tx, x_axis), tracer.ledger.read(tw, w_axis)
    levers = tw.levers_of(w_axis)
    if not tw.static or not levers:
        constant = tracer.constants.among([weight])
        reason = f"multiplied with {constant}" if constant else _FIXED if tw.static else _PRODUCT
        tracer.ledger.freeze(labels, reason)
        tracer.ledger.freeze(columns, reason)
        return
    count_uses(tracer, tw, positions * weight.numel())
    alone = columns if len(levers) == 1 and _reads_input(tracer, tx.levers_of(x_axis)) else None
    consumers = [_consumer(tracer, name, dim, labels, alone) for name, dim in sorted(levers)]
    consumer = consumers[0]
    virtual = f"{consumer.module}.input"
    asked = consumer.axis is not None and any(fnmatchcase(consumer.module, p) for p in tracer.input_patterns)
    if asked and not tracer.ledger.are_joined(columns):  # a mask of the weight could not follow
        tracer.facts.inputs.setdefault(virtual, consumer)
        tracer.facts.producers.setdefault((virtual, 0))
        features = tracer.ledger.fresh(virtual, 0, len(labels))
        tracer.ledger.join(labels, features)
        tracer.ledger.freeze(np.where(labels < 0, features, -1), "features of the model's input")
    elif not is_same(tx.axes[x_axis]):  # equal entries, such as a first hidden state of zeros, fit any width
        tracer.meet(labels, columns, "one side of this contraction cannot be cut (the model's input, or frozen)")
    consume(tracer, consumers)
    tracer.facts.contracted.update(levers)


def pair(tracer: Tracer, x: Tensor, x_axis: int, y: Tensor, y_axis: int) -> None:
    """Join two axes of activations that are multiplied and summed over, so that their units go in pairs.

    Gates close the units of one of the two where they are born. Its levers are then consumers.

    Args:
        tracer: The tracer.
        x: One activation.
        x_axis: Its axis.
        y: The other one.
        y_axis: Its axis.
    """
    tx, ty = tracer.tag(x), tracer.tag(y)
    labels, others = tracer.ledger.read(tx, x_axis), tracer.ledger.read(ty, y_axis)
    constant = tracer.constants.among([x, y])
    reason = f"multiplied with {constant}" if constant else _PAIR
    tracer.meet(labels, others, reason)
    if not close_at_birth(tracer, tx.levers_of(x_axis) or ty.levers_of(y_axis)):
        tracer.ledger.freeze(labels, reason)
        tracer.ledger.freeze(others, reason)


def close_at_birth(tracer: Tracer, levers: Levers) -> bool:
    """Let gates act through levers on units that no weight reads; return whether there are any."""
    if any(name not in tracer.parameters for name, _ in levers):
        return False
    consume(tracer, [Consumer(name, dim, owner(name), None, False, at_birth=True) for name, dim in sorted(levers)])
    return bool(levers)


def _reads_input(tracer: Tracer, levers: Levers) -> bool:
    """Return whether what has these levers is zero where the first input of the innermost module is.

    Layers of torch multiply their input by their weight as it is. Other modules may apply a function to it before.
    """
    if not tracer.calls:
        return False
    forward = type(tracer.model.get_submodule(tracer.calls[-1][0])).forward
    return forward.__module__.startswith("torch.nn.") or levers == tracer.input_levers


def consume(tracer: Tracer, consumers: Sequence[Consumer]) -> None:
    """Note that units are read through these dimensions of parameters."""
    for consumer in consumers:
        found = tracer.facts.consumers.setdefault((consumer.tensor, consumer.dim), [])
        if consumer not in found:
            found.append(consumer)


def count_uses(tracer: Tracer, weight: Tag, multiplications: float) -> None:
    """Add to how often each entry of a parameter is multiplied for one sample, in a run that counts.

    Args:
        tracer: The tracer.
        weight: The labels of the parameter, or of a weight that is computed from it, perhaps with others. The
            largest of these is counted.
        multiplications: How many multiplications there are, for the whole batch.
    """
    names = {name for own in weight.levers for name, _ in own}
    if tracer.count and names:
        name = max(sorted(names), key=lambda n: prod(tracer.parameters[n]))
        each = multiplications / max(prod(tracer.parameters[name]), 1)
        tracer.facts.uses[name] = tracer.facts.uses.get(name, 0.0) + each / (tracer.batch or 1)


def _consumer(tracer: Tracer, name: str, dim: int, labels: np.ndarray, columns: np.ndarray | None) -> Consumer:
    """Return who reads these labels through a dimension of a parameter.

    The consumer is the module that owns the parameter. Its axis is known if the module is the innermost one that is
    running, and its first input carries exactly these labels on one axis.

    Args:
        tracer: The tracer.
        name: The name of the parameter.
        dim: Its dimension.
        labels: The labels that are read.
        columns: The labels of the weight that reads them, which must be those of the parameter, in its order, for
            the axis to be known. None where the weight is computed from others, too, or reads something else than the
            module's first input.
    """
    module = owner(name)
    axis, per_sample = None, False
    own = tracer.ledger.fresh(name, dim, tracer.parameters[name][dim])
    alone = columns is not None and np.array_equal(columns, own)
    if alone and tracer.calls and tracer.calls[-1][0] == module and tracer.calls[-1][1] is not None:
        first = tracer.calls[-1][1]
        tag = tracer.tag(first)
        places = [i for i, a in enumerate(tag.axes) if _reads(tracer, tag, i, a, labels)]
        if (labels < 0).all():  # no label tells axes apart, but a convolution reads axis 1 and a linear the last
            convolution = isinstance(tracer.model.get_submodule(module), Conv)
            places = [p for p in places if p == (1 if convolution else len(tag.axes) - 1)]
        if len(places) == 1:
            axis = places[0] - len(tag.axes)
            per_sample = is_batch(tag.axes[0]) and places[0] != 0
    return Consumer(name, dim, module, axis, per_sample)


def _reads(tracer: Tracer, tag: Tag, index: int, axis: Axis, labels: np.ndarray) -> bool:
    """Return whether an axis carries exactly these labels."""
    size = int(np.prod([f.size for f in axis])) if axis else 1
    return size == len(labels) and bool((tracer.ledger.read(tag, index) == labels).all())
