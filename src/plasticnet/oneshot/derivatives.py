"""How much the loss changes when a unit goes, to first order: by its parameters, or by its gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    parameters = [p for p in net.model.parameters() if p.is_floating_point() or p.is_complex()]
    fixed = [p for p in parameters if not p.requires_grad]  # what does not train can be cut, too
    try:
        for p in fixed:
            p.requires_grad_(True)
        with torch.enable_grad():
            f = _dependent(run_closure(net, net.sampler, loss, Pass()))
            gradients = torch.autograd.grad(f.mean(), parameters, allow_unused=True)
    finally:
        for p in fixed:
            p.requires_grad_(False)
    of = dict(zip(parameters, gradients, strict=True))

    def product(p: nn.Parameter) -> Tensor:
        g = of.get(p)
        return torch.zeros_like(in_double(p)) if g is None else in_double(g) * in_double(p)

    return sums_by_unit(net, product).square()


def gate_squares(net: PlasticNet, loss: Loss) -> Tensor:
    if all(net.gating.per_sample.values()) and net.sampler.mode != "batch" and not uses_batch_statistics(net.model):
        try:
            return _gate_squares(net, loss, apart=True)
        except PlasticError:  # rows that are not samples; whatever else is wrong will be said again
            pass
    return _gate_squares(net, loss, apart=False)


def _gate_squares(net: PlasticNet, loss: Loss, *, apart: bool) -> Tensor:
    """The squared derivatives with respect to the gates, of each sample's own, or of the batch's."""
    now, weights, calls = net.mean_gates()[0], net.mean_weights(), list[Tensor]()

    def gates(rows: int) -> Tensor:
        calls.append(now.expand(rows if apart else 1, -1).clone().requires_grad_())
        return calls[-1]

    with torch.enable_grad(), _gated_blocks(net, lambda: calls[-1][0]):
        f = _dependent(run_closure(net, net.sampler, loss, Pass("probe", probe=gates, weights=weights)))
        found = torch.autograd.grad(f.sum(), calls, materialize_grads=True)
    found = [(g * z.detach())[:, :-1].double() for g, z in zip(found, calls, strict=True)]
    if apart and f.dim():
        if all(len(g) == len(f) for g in found):  # all calls were on the same samples
            return torch.stack(found).sum(0).square().mean(0)
        if sum(len(g) for g in found) == len(f):
            return torch.cat(found).square().mean(0)
    return (torch.cat(found).sum(0) / f.numel()).square()


@contextmanager
def _gated_blocks(net: PlasticNet, gates: Callable[[], Tensor]) -> Iterator[None]:
    """Within this context the gates of blocks have a derivative: between what a block gives, and its first input."""

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


def _dependent(f: Tensor) -> Tensor:
    if not f.requires_grad:
        raise PlasticError("scores that follow a gradient need a loss that depends on the network: from net(x)")
    return f


@contextmanager
def without_cudnn(net: PlasticNet) -> Iterator[None]:
    """Within this context cuDNN, which has no gradients of recurrent layers in evaluation mode, leaves those alone."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in net.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled
