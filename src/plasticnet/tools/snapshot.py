"""Copies models, and restores what a run changes apart from its outputs: random numbers and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.tools.copying import deep_copy
from plasticnet.tools.fsdp_private import gathers
from plasticnet.tools.gradients import without_gradients
from plasticnet.tools.sharding import is_sharded
from plasticnet.tools.torch_private import buffers_of, forget_parametrized


def duplicate(model: nn.Module, parameters: Callable[[nn.Parameter], nn.Parameter] | None = None) -> nn.Module:
    """Return a deep copy of a model, in whatever state it is.

    Results of a computation that it keeps, such as attention maps or the weight of the old weight_norm, are copied
    without their graph. What cannot be copied, such as a lock or an open file, is shared.

    Args:
        model: The model.
        parameters: Makes the parameters of the copy from those of the model; by default they are copied.

    Raises:
        PlasticError: A module within the model refuses to be copied.
    """
    if any(is_sharded(p) for p in model.parameters()) or gathers(model):
        raise PlasticError(
            f"{type(model).__name__} cannot be copied: fully_shard has left a part of it in every process. Do it "
            "before fully_shard, or with the plain module that net.compact() returns"
        )
    known = {} if parameters is None else {id(p): parameters(p) for p in model.parameters()}
    return deep_copy(model, known)


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy that holds the very parameters of the model, in order to run it or to replace some of them."""
    return duplicate(model, lambda p: p)


class RandomState:
    """The present state of the random number generators of the CPU and of the GPUs that hold a model.

    Args:
        model: The model whose parameters say which GPUs are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        used = torch.cuda.is_initialized()
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda}) if used else []
        self._cpu = torch.get_rng_state()
        self._cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices]

    def restore(self) -> None:
        """Put the generators back into this state."""
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
    """The present state of the random number generators and of the buffers of a model.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.random = RandomState(model)
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor | None]] = [
            (module, key, b, None if _expanded(b) else b.detach().clone())
            for module in model.modules()
            for key, b in buffers_of(module).items()
            if b is not None
        ]

    def restore(self) -> None:
        """Put everything back, also buffers that were replaced by other tensors.

        A graph that waits for its backward pass does not count this as a change.
        """
        self.random.restore()
        for module, key, buffer, before in self._buffers:
            if before is not None:
                buffer.data.copy_(before)
            buffers_of(module)[key] = buffer


def _expanded(t: Tensor) -> bool:
    """Return whether entries of a tensor share their memory, so that it cannot be written to."""
    return t.layout == torch.strided and any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True))


@contextmanager
def left_as_it_was(module: nn.Module, *, training: bool | None = None, after: Snapshot | None = None) -> Iterator[None]:
    """Run a module without gradients in this context, and leave everything as if nothing had been run.

    See `without_gradients` for models that take gradients themselves. Random numbers, buffers and modes are restored.

    Args:
        module: The module.
        training: Whether the module is in training mode in this context; None leaves its modes alone.
        after: The state of random numbers and buffers afterwards; by default their state before.
    """
    after = after or Snapshot(module)
    modes = [] if training is None else [(m, m.training) for m in module.modules()]
    if training is not None:
        module.train(training)
    try:
        with without_gradients():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
        after.restore()
        # The run may have cached weights without gradients: cast ones, and those within `parametrize.cached`.
        torch.clear_autocast_cache()
        forget_parametrized()
