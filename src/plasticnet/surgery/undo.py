"""Puts everything back when a change of size or the end of an epoch fails midway, so that it can be tried again.

It may fail anywhere: memory runs out, the user interrupts it, or data cannot be read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plasticnet.gates.gated import GatedModel
from plasticnet.tools.gradients import outside_inference_mode
from plasticnet.tools.sharding import Shards, is_sharded
from plasticnet.tools.snapshot import Snapshot
from plasticnet.tools.torch_private import give_shape
from plasticnet.units import BlockUnits


@contextmanager
def undone_on_error(
    net: GatedModel,
    optimizers: Sequence[Optimizer],
    others: Iterable[object],
    written: Iterable[nn.Parameter] = (),
) -> Iterator[None]:
    """Put a network, its optimizers and other objects back to where they were, if an error leaves this context.

    A resize makes new parameters and leaves the old ones alone, so that these need no copies. Within this context they
    stay in memory, though, together with the state that the optimizers had of them. Only what may be changed in place
    is copied: buffers, gates, what optimizers keep of gates, and the blocks that sleep, since they wake anew.
    Within it `torch.inference_mode` is off.

    Args:
        net: The network.
        optimizers: The optimizers that hold its parameters.
        others: Objects whose attributes are put back. Lists and dicts among these may be changed in place.
        written: Parameters that get other values, or another shape, in place, and so are copied.
    """
    with outside_inference_mode():
        before = _Before(net, optimizers, [*others, net.sizes, net.ranks], written)
        try:
            yield
        except BaseException:
            before.restore()
            raise


class _Before:
    """What a network, its optimizers and other objects are at a moment; see `undone_on_error`."""

    def __init__(
        self,
        net: GatedModel,
        optimizers: Sequence[Optimizer],
        others: Sequence[object],
        written: Iterable[nn.Parameter],
    ) -> None:
        self._put_shards_back = Shards(net).kept()  # first, because it may change what the modules hold
        self._buffers = Snapshot(net.model)  # and random numbers
        self._modules = [(m, type(m), _attributes(m)) for m in net.modules()]
        self._others = [(o, _attributes(o)) for o in others]
        self._gradients = [(p, p.grad) for p in net.parameters()]
        self._groups = [(group, dict(group)) for o in optimizers for group in o.param_groups]
        self._states = [
            (o, dict(o.state), [(s, dict(s)) for s in o.state.values() if isinstance(s, dict)]) for o in optimizers
        ]
        logits = [g.phi for g in net.all_gates()]
        kept = [v for o in optimizers for phi in logits for v in o.state.get(phi, {}).values()]
        changing = (*logits, *(s.grace for s in net.sites.values()), *_asleep(net), *kept)
        self._values = [(t, t.detach().clone()) for t in changing if isinstance(t, Tensor)]
        self._written = [(p, p.data, p.detach().clone()) for p in written if not is_sharded(p)]

    def restore(self) -> None:
        """Put everything back."""
        for module, kind, attributes in self._modules:
            if type(module) is not kind:
                module.__class__ = kind
            _put_back(module, attributes)
        self._put_shards_back()
        for other, attributes in self._others:
            _put_back(other, attributes)
        for group, items in self._groups:
            _replace(group, items)
        for optimizer, state, inner in self._states:
            _replace(optimizer.state, state)
            for own, items in inner:
                _replace(own, items)
        with torch.no_grad():
            for parameter, data, value in self._written:
                if parameter.shape != data.shape:
                    give_shape(parameter, data)
                parameter.copy_(value)
            for tensor, value in self._values:
                tensor.copy_(value)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._buffers.restore()


def _asleep(net: GatedModel) -> Iterator[Tensor]:
    """Yield the parameters of all blocks that sleep."""
    for site in net.sites.values():
        if isinstance(site.units, BlockUnits):
            for block, asleep in zip(site.units.blocks, site.asleep.tolist(), strict=True):
                if asleep:
                    yield from net.model.get_submodule(block).parameters()


def _attributes(thing: object) -> list[tuple[str, Any, Any]]:
    """Return the name and the value of every attribute, and the contents of the value where it is a list or a dict."""
    kinds = (list, dict, OrderedDict)  # of which torch keeps hooks in the last
    return [(n, v, type(v)(v) if type(v) in kinds else None) for n, v in vars(thing).items()]


def _put_back(thing: object, attributes: Sequence[tuple[str, Any, Any]]) -> None:
    """Give an object the attributes that it had."""
    _replace(vars(thing), {name: value for name, value, _ in attributes})
    for _, value, contents in attributes:
        if isinstance(contents, dict):
            _replace(value, contents)
        elif isinstance(contents, list):
            value[:] = contents


def _replace(held: Any, items: dict[Any, Any]) -> None:
    """Let a mapping hold these items and no others."""
    held.clear()
    held.update(items)
