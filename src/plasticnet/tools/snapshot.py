"""Copies of models; and what a run changes beside its outputs (random numbers, buffers), kept and put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.tools.torch_private import buffers_of, forget_parametrized


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


class RandomState:
    """The random number generators as they are now: the CPU's and those of the GPUs that hold the model."""

    def __init__(self, model: nn.Module) -> None:
        used = torch.cuda.is_initialized()
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda}) if used else []
        self._cpu = torch.get_rng_state()
        self._cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices]

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomState)
            and torch.equal(self._cpu, other._cpu)
            and all(torch.equal(a, b) for (_, a), (_, b) in zip(self._cuda, other._cuda, strict=True))
        )


class Snapshot:
    """The random number generators and the buffers of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self.random = RandomState(model)
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor | None]] = [
            (module, key, b, None if _expanded(b) else b.detach().clone())
            for module in model.modules()
            for key, b in buffers_of(module).items()
            if b is not None
        ]

    def restore(self) -> None:
        """Put everything back: a buffer that was bound anew too. A graph that waits for its backward pass
        does not count this as a change."""
        self.random.restore()
        for module, key, buffer, before in self._buffers:
            if before is not None:
                buffer.data.copy_(before)
            buffers_of(module)[key] = buffer


def _expanded(t: Tensor) -> bool:
    """Whether entries share their memory: such a tensor cannot be written to."""
    return t.layout == torch.strided and any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True))


@contextmanager
def left_as_it_was(module: nn.Module, *, training: bool | None = None, after: Snapshot | None = None) -> Iterator[None]:
    """Run a module without gradients, and leave everything as if nothing had been run: random numbers, buffers, modes.

    ``training`` puts the module in training or evaluation mode for this context (None: its modes stay).
    Afterwards random numbers and buffers are as they were, or in the state ``after``.
    """
    after = after or Snapshot(module)
    modes = [] if training is None else [(m, m.training) for m in module.modules()]
    if training is not None:
        module.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
        after.restore()
        torch.clear_autocast_cache()  # the pass has cached weights cast without gradient,
        forget_parametrized()  # and parametrized ones, within `parametrize.cached`
