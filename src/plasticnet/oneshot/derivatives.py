"""Estimates to first order how much the loss changes without a unit: by its parameters, or by its gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.learning.passes import run_closure
from plasticnet.learning.sampler import Pass
from plasticnet.net import PlasticNet
from plasticnet.oneshot.sums import in_double, sums_by_unit
from plasticnet.tools.inputs import Loss
from plasticnet.tools.statistics import uses_batch_statistics


def taylor_squares(net: PlasticNet, loss: Loss) -> Tensor:
    """Return the squared sums of gradient times weight over the parameters of each unit.

    This is the estimate of Molchanov et al., arXiv 1906.10771, of how much the loss changes without the unit. A
    convolution and the scale and shift behind it say the same, so only the last of them counts.

    Args:
        net: The network.
        loss: A function without arguments that returns losses, shape (batch,), or their mean. It is called once.

    Returns:
        The squares for the units of all sites, shape (units,), in double precision.

    Raises:
        PlasticError: The loss does not depend on the network.
    """
    parameters = [p for p in net.model.parameters() if p.is_floating_point() or p.is_complex()]
    with with_gradients_of(parameters):
        f = dependent(run_closure(net, net.sampler, loss, Pass()))
        gradients = torch.autograd.grad(f.mean(), parameters, allow_unused=True)
    of = dict(zip(parameters, gradients, strict=True))

    def product(p: nn.Parameter) -> Tensor:
        g = of.get(p)
        return torch.zeros_like(in_double(p)) if g is None else in_double(g) * in_double(p)

    return sums_by_unit(net, product, once=True).square()


@contextmanager
def with_gradients_of(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Take gradients in this context, also with respect to parameters that do not train: those can be cut, too."""
    fixed = [p for p in parameters if not p.requires_grad]
    try:
        for p in fixed:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p in fixed:
            p.requires_grad_(False)


def gate_squares(net: PlasticNet, loss: Loss) -> Tensor:
    """Return the squares of each gate times the derivative of the loss with respect to it.

    This is the estimate of Theis et al., arXiv 1801.05787, of how much the loss changes without the unit. Where samples
    do not interact, the squares are those of each sample, averaged over the samples. Otherwise they are those of the
    batch.

    Args:
        net: The network.
        loss: A function without arguments that returns losses, shape (batch,), or their mean.

    Returns:
        The squares for the units of all sites, shape (units,), in double precision.

    Raises:
        PlasticError: The loss does not depend on the network.
    """
    if draws_apart(net):
        try:
            return derivatives(net, loss, apart=True).square().mean(0)
        except PlasticError:  # The rows may not be samples. Any other error will be raised again below.
            pass
    return derivatives(net, loss, apart=False).square().mean(0)


def draws_apart(net: PlasticNet) -> bool:
    """Return whether samples can have gates of their own, as far as is known before the network runs."""
    own = all(net.gating.per_sample.values()) and net.sampler.mode != "batch"
    return own and not uses_batch_statistics(net.model)


def derivatives(net: PlasticNet, loss: Loss, *, apart: bool) -> Tensor:
    """Return each gate times the derivative of the losses with respect to it, in double precision.

    Args:
        net: The network.
        loss: A function without arguments that returns losses, shape (batch,), or their mean. It is called once.
        apart: Whether every sample has gates of its own, as far as it can be seen that there is a loss for each.

    Returns:
        The derivatives of every sample's loss, shape (samples, units), or that of the mean loss, shape (1, units).

    Raises:
        PlasticError: The loss does not depend on the network, or the rows of its inputs are not samples.
    """
    with _with_gates(net, apart) as calls:
        f = dependent(_closure(net, loss, calls, apart))
        found = _slopes(f.sum(), calls)
    if apart and f.dim():
        if all(len(g) == len(f) for g in found):  # All calls of the network were on the same samples.
            return torch.stack(found).sum(0)
        if sum(len(g) for g in found) == len(f):
            return torch.cat(found)
    return torch.cat(found).sum(0, keepdim=True) / f.numel()


def signed_derivatives(net: PlasticNet, loss: Loss, draws: int, generator: torch.Generator) -> Tensor:
    """Return the derivatives of sums of the losses with random signs, over the root of their number.

    The samples share their gates. The mean square of such a sum is the mean square of the samples' own derivatives.

    Args:
        net: The network.
        loss: A function without arguments that returns losses, shape (batch,), or their mean. It is called once.
        draws: How often signs are drawn.
        generator: What draws them.

    Returns:
        Shape (draws, units), or (1, units) for a mean loss.

    Raises:
        PlasticError: The loss does not depend on the network.
    """
    with _with_gates(net, False) as calls:
        f = dependent(_closure(net, loss, calls, False))
        if not f.dim():
            return torch.cat(_slopes(f, calls)).sum(0, keepdim=True)
        signs = random_signs((draws, len(f)), generator).to(f)
        sums = (signs * f).sum(1) / len(f) ** 0.5
        return torch.stack([torch.cat(_slopes(s, calls, again=True)).sum(0) for s in sums])


def random_signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return numbers that are 1 or -1."""
    return torch.randint(2, tuple(shape), generator=generator) * 2 - 1


@contextmanager
def _with_gates(net: PlasticNet, apart: bool) -> Iterator[list[Tensor]]:
    """Take gradients in this context, and give the gates that each call of the network has used."""
    calls = list[Tensor]()
    with torch.enable_grad(), _gated_blocks(net, lambda: calls[-1][0]):
        yield calls


def _closure(net: PlasticNet, loss: Loss, calls: list[Tensor], apart: bool) -> Tensor:
    """Return the losses at the mean gates; each call of the network adds the gates that it has used to ``calls``."""
    now = net.mean_gates()[0]

    def gates(rows: int) -> Tensor:
        calls.append(now.expand(rows if apart else 1, -1).clone().requires_grad_())
        return calls[-1]

    return run_closure(net, net.sampler, loss, Pass("probe", probe=gates, weights=net.mean_weights()))


def _slopes(f: Tensor, calls: list[Tensor], again: bool = False) -> list[Tensor]:
    """Return each gate of each call times the derivative of a sum of losses, shape (rows, units)."""
    found = torch.autograd.grad(f, calls, materialize_grads=True, retain_graph=again)
    return [(g * z.detach())[:, :-1].double() for g, z in zip(found, calls, strict=True)]


@contextmanager
def _gated_blocks(net: PlasticNet, gates: Callable[[], Tensor]) -> Iterator[None]:
    """Give the gates of blocks a derivative in this context.

    With respect to its gate, a block's output has the derivative output minus first input.
    """

    def mixing(i: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
            z = gates()[i].to(out.dtype)
            return out + (z - z.detach()) * (out - (args[0] if args else next(iter(kwargs.values()))))

        return hook

    handles = [m.register_forward_hook(mixing(i), with_kwargs=True) for m, i in net.gating.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dependent(f: Tensor) -> Tensor:
    """Return the losses, or raise `PlasticError` where they do not depend on the network."""
    if not f.requires_grad:
        raise PlasticError("scores that follow a gradient need a loss that depends on the network: from net(x)")
    return f


@contextmanager
def without_cudnn(net: PlasticNet) -> Iterator[None]:
    """Run recurrent layers without cuDNN in this context, which has no gradients for them in evaluation mode."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in net.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled
