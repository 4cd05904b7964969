"""Has the rules for operations that compute weights from parameters."""

from __future__ import annotations

from typing import Any

from plasticnet.tracing.labels import NO_LEVERS, Tag
from plasticnet.tracing.mode import Tracer, rule


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Join the rows of a direction with their lengths.

    Gates on rows act on the lengths. Where gates act on other dimensions of the direction, or these are cut, its norms
    change, and lengths change with them (`Facts.lengths`). That is possible if both are parameters.
    """
    direction, length = args[:2]
    dim = (args[2] if len(args) > 2 else 0) % direction.dim()
    tag = tracer.ledger.settle(tracer.tag(direction))
    labels = tracer.ledger.read(tag, dim)
    tracer.attach(labels, length, "a length without units", dim)
    names = [tracer.names.get(id(t)) for t in (direction, length)]
    if names[0] in tracer.parameters and names[1] in tracer.parameters:
        tracer.facts.lengths[names[0]] = (names[1], dim)
        own = tracer.tag(length)
        levers = [own.levers_of(d) if d == dim else kept for d, kept in enumerate(tag.levers)]
        axes = [own.axes[d] if d == dim else axis for d, axis in enumerate(tag.axes)]
    else:
        others = [d for d in range(direction.dim()) if d != dim]
        tracer.freeze(direction, "a weight whose length is fixed by weight_norm", others)
        levers, axes = [NO_LEVERS] * direction.dim(), list(tag.axes)
    for o in out if isinstance(out, tuple) else (out,):
        if o.shape == direction.shape:
            tracer.put(o, Tag(tuple(axes), tuple(levers), tag.static))
