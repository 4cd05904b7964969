"""Copies of models; and what a run changes beside its outputs (random numbers, buffers), kept and put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def duplicate(model: nn.Module, parameters: Callable[[nn.Parameter], nn.Parameter] | None = None) -> nn.Module:
    """A deep copy; ``parameters`` makes its parameters from the model's own.

    Attributes that are results of a computation (the weight of the old weight_norm) are copied by
    value: ``deepcopy`` refuses them."""
    computed = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    known: dict[int, Any] = {id(t): t.detach().clone() for t in computed}
    if parameters is not None:
        known.update((id(p), parameters(p)) for p in model.parameters())
    return copy.deepcopy(model, known)


def sharing(model: nn.Module) -> nn.Module:
    """A copy that holds the very parameters of the model: to run, or to replace some of them."""
    return duplicate(model, lambda p: p)


class Snapshot:
    """The random number generators and the buffers of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(d) for d in self._devices]
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (module, key, b, b.detach().clone())
            for module in model.modules()
            for key, b in module._buffers.items()
            if b is not None
        ]

    def restore(self) -> None:
        """Put everything back: a buffer that was bound anew too."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        with torch.no_grad():
            for module, key, buffer, before in self._buffers:
                buffer.copy_(before)
                module._buffers[key] = buffer


@contextmanager
def side_effect_free(model: nn.Module, snapshot: Snapshot | None = None) -> Iterator[None]:
    """Run without gradients, leaving random numbers and buffers as if nothing had been run.

    ``snapshot`` is one that was taken already, with nothing run since.
    """
    snapshot = snapshot or Snapshot(model)
    try:
        with torch.no_grad():
            yield
    finally:
        snapshot.restore()
        # Under autocast the pass has cached weights cast without gradient.
        torch.clear_autocast_cache()
