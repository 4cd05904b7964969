"""Follows what a model keeps from one call to the next, as a stream does that holds its hidden state in a buffer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from plasticnet.tools.inputs import Call
from plasticnet.tools.torch_private import buffers_of, is_transformed, version
from plasticnet.tracing.labels import is_same
from plasticnet.tracing.mode import Tracer

_MODULE = frozenset(vars(nn.Module()))  # the attributes that every module has
_NO_BUFFER = "no buffer, so that nothing could cut it: hold it in one (register_buffer)"
_SIMPLE = (bool, int, float, complex, str, type(None))


class Kept:
    """What a model holds beside its parameters: buffers, and whatever lies in other attributes.

    Args:
        model: The model.

    Attributes:
        buffers: The buffers by name, as the model has them now.
        held: For each buffer and each attribute the tensors and other values in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers: dict[str, Tensor | None] = {}
        self.held: dict[str, list[Any]] = {}
        for prefix, module in model.named_modules():
            own = {key: value for key, value in vars(module).items() if key not in _MODULE}
            for key, value in {**own, **buffers_of(module)}.items():
                name = f"{prefix}.{key}".removeprefix(".")
                self.held[name] = _leaves(value)
                if key in buffers_of(module):
                    self.buffers[name] = buffers_of(module)[key]
        self._marks = {name: [_mark(value) for value in values] for name, values in self.held.items()}

    def changed(self, before: Kept, written: bool) -> list[str]:
        """Return the names of what is not as it was before; ``written`` counts changes in place, too."""
        cut = None if written else 2
        return [
            name
            for name, marks in self._marks.items()
            if [m[:cut] for m in marks] != [m[:cut] for m in before._marks.get(name, [])]
        ]


def _leaves(value: Any) -> list[Any]:
    """Return what lies in nested containers; one that holds itself counts as empty."""
    try:
        return tree_leaves(value)
    except RecursionError:
        return []


def _mark(value: Any) -> tuple[Any, ...]:
    """Return what changes when a value is replaced or, in the third place, written to."""
    if isinstance(value, Tensor):
        stored = value.layout == torch.strided and not value.is_meta and not is_transformed(value)
        there = value.data_ptr() if stored else 0
        return id(value), there, 0 if value.is_inference() else version(value)
    return (type(value), value if isinstance(value, _SIMPLE) else None)


def follow(tracer: Tracer, before: Kept, call: Call) -> None:
    """Run the model once more if it has kept something, and join what it has kept with what reads it in this run.

    A buffer that was set anew belongs to the units that it was computed from. In any other attribute nothing could cut
    a tensor, so that units which a later call reads there are frozen.

    Args:
        tracer: The tracer, whose model has run once.
        before: What the model held before.
        call: How the model is called.
    """
    now = Kept(tracer.model)
    changed = now.changed(before, written=not call.training)  # in training BatchNorm writes into its statistics
    known = {id(value) for values in before.held.values() for value in values}
    new = [(n, t) for n in changed for t in now.held[n] if isinstance(t, Tensor) and id(t) not in known]
    new = [(n, t) for n, t in new if not isinstance(t, nn.Parameter)]
    simple = any(not isinstance(v, Tensor) for n in changed for v in now.held[n])
    if not new and not simple and not any(n in now.buffers for n in changed) and not tracer.liveness.lingers():
        return
    facts = tracer.facts
    names = {id(old): tracer.names[id(old)] for old in before.buffers.values() if id(old) in tracer.names}
    tracer.names.update((id(t), n) for n, t in new)
    tracer.count = False
    seen, facts.seen = facts.seen, set()
    with suppress(Exception):  # what a model refuses in a second call cannot be traced
        tracer.run(call)
    read, facts.seen = facts.seen, facts.seen | seen
    _read_in_the_other_mode(tracer, call)
    for name, t in new:
        old = before.buffers.get(name)
        if old is not None and old.dim() == t.dim() and id(old) in names:
            _join(tracer, names[id(old)], old, t)
        elif name in read:
            what = "a buffer of another shape: call the model once before" if name in now.buffers else _NO_BUFFER
            tracer.freeze(t, f"the model keeps it from call to call in {name}, which is {what}")
    facts.stateful |= simple or any(n in now.buffers for n in changed) or any(n in read for n, _ in new)


def _read_in_the_other_mode(tracer: Tracer, call: Call) -> None:
    """Run the model in the other mode, too, if anything is kept that only this might read, such as a mean of means."""
    if tracer.liveness.lingers():
        seen = set(tracer.facts.seen)
        tracer.model.train(not call.training)
        with suppress(Exception):  # which count as having read everything
            tracer.run(replace(call, training=not call.training))
        tracer.model.train(call.training)
        tracer.facts.seen = seen


def _join(tracer: Tracer, name: str, old: Tensor, new: Tensor) -> None:
    """Join the labels of a buffer with those of the tensor that the model has put in its place.

    Args:
        tracer: The tracer.
        name: The name of the buffer.
        old: The buffer as it was.
        new: The tensor.
    """
    tracer.facts.seen.add(name)
    tag = tracer.ledger.settle(tracer.tag(new))
    for d, (n, m) in enumerate(zip(old.shape, new.shape, strict=True)):
        if n and not is_same(tag.axes[d]):
            own, labels = tracer.ledger.fresh(name, d, n), tracer.ledger.read(tag, d)
            if n == m:
                tracer.meet(labels, own, f"kept from call to call in {name} beside what cannot be cut")
            else:
                for found in (own, labels):
                    tracer.ledger.freeze(found, f"kept from call to call in {name}, whose shape changes")
