"""Finds what is NaN or infinite in a run, so that the last state that was good is not replaced by one that is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.apps.data import Split, Task
from plasticnet.apps.scores import losses
from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.tools.snapshot import left_as_it_was
from plasticnet.tools.trees import tensors_within

_ADVICE = "lower the learning rate or check the data"


@contextmanager
def named(place: str) -> Iterator[None]:
    """Let the message of a `PlasticError` begin with the place in the run at which it is raised."""
    try:
        yield
    except PlasticError as error:
        raise PlasticError(f"{place}: {error}") from error


@contextmanager
def naming_output(net: PlasticNet, x: Tensor) -> Iterator[None]:
    """Let the message of a `PlasticError` name the first output that is not finite, if there is one.

    Args:
        net: The network.
        x: The inputs with which it ran.
    """
    try:
        yield
    except PlasticError as error:
        if not _finite(x):
            row = int((~torch.isfinite(x.flatten(1)).all(1)).int().argmax())
            raise PlasticError(f"{error}; input {row} of the batch is itself not finite") from error
        found = next((name for name in (_first_output(net, x, t) for t in (False, True)) if name is not None), None)
        if found is None:
            raise
        raise PlasticError(f"{error}; the first output that is not finite is that of {found}") from error


def check_gradients(net: PlasticNet) -> None:
    """Raise `PlasticError` unless all gradients are finite; it names the first parameter, and those of gates."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if gradients and not bool(torch.isfinite(nn.utils.get_total_norm(gradients, math.inf))):
        logits = [(f"the logits of the gates of {g.name!r}", g.phi) for g in net.all_gates()]
        named_all = [*net.model.named_parameters(), *logits]
        name = first_culprit((n, p.grad) for n, p in named_all if p.grad is not None)
        raise PlasticError(f"the gradient of {name} is not finite (NaN or infinite); {_ADVICE}")


class Guard:
    """Watches the tensors of a run: weights, buffers, gates, and what the optimizer remembers.

    A model may hold tensors that are infinite by design, such as a mask. They are known by being so when training
    begins, and may then be infinite, but not NaN.

    Args:
        net: The network, before training.
        optimizer: Its optimizer.
    """

    def __init__(self, net: PlasticNet, optimizer: torch.optim.Optimizer) -> None:
        self.net, self.optimizer = net, optimizer
        self.infinite = {name for name, tensor in self._tensors() if not _finite(tensor) and not _has_nan(tensor)}

    def culprit(self) -> str | None:
        """Return the name of the first tensor that is not finite, in the order of the modules, or None."""
        return first_culprit(self._tensors(), self.infinite)

    def check(self, when: str) -> None:
        """Raise `PlasticError` unless all tensors are finite. Within `naming` its message names the first of them.

        Args:
            when: When in the run this is.
        """
        if self.culprit() is not None:
            raise PlasticError(f"{when}: there are NaN or infinite numbers; {_ADVICE}")

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let the message of a `PlasticError` end with the first tensor that is not finite, if there is one."""
        try:
            yield
        except PlasticError as error:
            found = self.culprit()
            if found is None:
                raise
            raise PlasticError(f"{error}; the first tensor that is not finite is {found}") from error

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a checkpoint saves, by names that a user knows: the model's tensors, the gates', the optimizer's.

        A checkpoint does not hold the buffers that the model does not save, so they are not looked at.
        """
        for name, value in self.net.model.state_dict().items():
            if isinstance(value, Tensor):  # what a module saves as its extra state may be anything
                yield name, value
        for gate in self.net.all_gates():
            yield f"the logits of the gates of {gate.name!r}", gate.phi.detach()
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {key} of {name.removeprefix('model.')}", value


def first_culprit(tensors: Iterable[tuple[str, Tensor]], infinite: Iterable[str] = ()) -> str | None:
    """Return the name of the first tensor that is not finite, or None.

    Args:
        tensors: The tensors with their names.
        infinite: The names of those that may be infinite, but not NaN.
    """
    for name, tensor in tensors:
        if not _finite(tensor) and (name not in infinite or _has_nan(tensor)):
            return name
    return None


def check_loss(loss: float, module: nn.Module, split: Split, part: str, task: Task) -> None:
    """Raise `PlasticError` unless a mean loss over samples is finite.

    Args:
        loss: The loss.
        module: What computed the loss, in evaluation mode.
        split: The samples.
        part: What they are called.
        task: What kind of answer they ask for.
    """
    if not math.isfinite(loss):
        raise PlasticError(f"the {part} loss is {loss}{_first_sample(module, split, part, task)}")


@torch.no_grad()
def _first_sample(module: nn.Module, split: Split, part: str, task: Task, batch: int = 1000) -> str:
    """Return a text about the first sample whose loss is not finite."""
    start = 0
    for x, y in zip(split.x.split(batch), split.y.split(batch), strict=True):
        bad = ~torch.isfinite(losses(module(x), y, task))
        if bool(bad.any()):
            at = int(bad.int().argmax())
            why = "has a finite input" if _finite(x[at]) else "is itself not finite"
            return f"; the first such sample is number {start + at} of the {part} data, which {why}"
        start += len(x)
    return ""


def _first_output(net: PlasticNet, x: Tensor, training: bool) -> str | None:
    """Return the name and the kind of the first module whose output is not finite, in the order of the run, or None."""
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if not found and not all(map(_finite, tensors_within(output))):
            found.append(f"{name or 'the model'!r} ({type(module).__name__})")

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in net.model.named_modules()
    ]
    try:
        with suppress(PlasticError), left_as_it_was(net, training=training):  # such as one about gates
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _finite(tensor: Tensor) -> bool:
    """Return whether all entries of a tensor are finite; those of integers are."""
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return not inexact or bool(torch.isfinite(tensor).all())


def _has_nan(tensor: Tensor) -> bool:
    """Return whether some entry of a tensor is NaN."""
    return bool(torch.isnan(tensor).any())
