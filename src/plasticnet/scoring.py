"""What each unit of a network is worth: by the size of its weights, or by what the loss says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet import distributed, passes
from plasticnet.errors import PlasticError
from plasticnet.snapshot import side_effect_free
from plasticnet.units import BlockUnits, Slice, Units
from plasticnet.weights import mean_weights

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet

Loss = Callable[[], Tensor]
Scores = str | Mapping[str, Tensor]  # a kind, or a number per unit
KINDS = ("magnitude", "taylor", "gate")


def scores(net: PlasticNet, kind: str, loss: Loss | None = None, *, batches: int = 1) -> dict[str, Tensor]:
    """What each unit is worth: for every site the scores of its units, shape (units,), 0 for closed ones.

    "magnitude" is the L2 norm of the parameters that produce a unit (rows of weights, bias, scale and shift of its
    norms); of a feature of an input site, that of its column; of a block, that of all its parameters. The other
    two estimate how much the loss changes when the unit goes: "taylor" is the sum of gradient times weight over
    the same parameters (Molchanov et al., arXiv 1906.10771), "gate" the derivative with respect to the gate, which
    acts at what consumers read (the statistics of norms stay as they are). Of both the squares are averaged over
    mini-batches, and those of "gate" over samples (Theis et al., arXiv 1801.05787) where ``loss`` gives losses per
    sample and all gates can be drawn per sample.

    All are divided by their root mean square over the site, so that they compare across sites. As they come their
    scale differs from layer to layer, and all of a layer but one unit may close.

    ``loss`` is a function without arguments that runs ``net`` on some data and returns its losses, shape (batch,), or a
    scalar. It is called ``batches`` times, in evaluation mode. Nothing of it is left behind, gradients and random
    numbers included.

    Raises `PlasticError` for an unknown kind, where a loss is missing, does not depend on the network or is not
    finite, and where scores are not finite or all 0.
    """
    if kind not in KINDS:
        raise PlasticError(f"scores={kind!r}: choose one of {', '.join(KINDS)}")
    if not net.sites:
        raise PlasticError("there are no units to score: only single weights have gates")
    if type(batches) is not int or batches < 1:
        raise PlasticError(f"batches={batches!r}: how often the loss is called, 1 or more")
    if kind == "magnitude":
        squares = _sums(net, lambda p: _real(p).square()) * (net._mean_gates()[0][:-1] > 0)
    elif loss is None:
        raise PlasticError(f"scores={kind!r} follow a gradient and need a loss: a function that runs net on data")
    else:
        of_batch = _taylor if kind == "taylor" else _gate
        with left_as_it_was(net):
            squares = torch.stack([of_batch(net, loss) for _ in range(batches)]).mean(0)
        squares = distributed.average(net, squares)
    if not bool(squares.any()):
        raise PlasticError(f"scores={kind!r} are all 0: no unit moves the loss (a last layer of zeros, say)")
    found: dict[str, Tensor] = {}
    for (name, site), part in zip(net.sites.items(), squares.split([len(s) for s in net.sites.values()]), strict=True):
        if not bool(torch.isfinite(part).all()):
            raise PlasticError(f"site {name!r}: its scores are not finite; look for NaN in the weights or gradients")
        found[name] = (part / part.mean().clamp(min=1e-300)).sqrt().to(site.phi.dtype)
    return found


@contextmanager
def left_as_it_was(net: PlasticNet) -> Iterator[None]:
    """Run the network in evaluation mode, without gradients, and leave nothing of it behind."""
    k, cudnn = net._k, torch.backends.cudnn.enabled
    training = [(module, module.training) for module in net.modules()]
    net.eval()
    if any(isinstance(module, nn.RNNBase) for module in net.modules()):
        torch.backends.cudnn.enabled = False  # it has no gradients of recurrent layers in evaluation mode
    try:
        with side_effect_free(net.model):
            yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        net._k = k  # by the property the gates would lose their gradients
        for module, flag in training:
            module.training = flag


def _real(t: Tensor) -> Tensor:
    """In double precision; a complex number as two real ones."""
    t = t.detach()
    return (torch.view_as_real(t) if t.is_complex() else t).double()


def _sums(net: PlasticNet, value: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """The sum of ``value`` over the parameters of each unit, shape (units,) for the units of all sites."""
    parameters = dict(net.model.named_parameters())
    sums: list[Tensor] = []
    for site in net.sites.values():
        total = torch.zeros(len(site), dtype=torch.float64, device=site.phi.device)
        if isinstance(site.units, BlockUnits):
            for name, p in parameters.items():
                if (i := site.units.inside(name)) is not None:
                    total[i] += value(p).sum()
        for s in _producing(site.units, parameters):
            along = value(parameters[s.tensor]).transpose(0, s.dim)
            total += along.reshape(len(along), -1).sum(1)[torch.from_numpy(s.index).to(total.device)].sum(1)
        sums.append(total)
    return torch.cat(sums)


def _producing(u: Units, parameters: Mapping[str, nn.Parameter]) -> list[Slice]:
    """Where the parameters lie that produce the units; where none do, as of a layer's inputs, those that read them."""
    slices = [s for s in u.slices if s.tensor in parameters]
    return [s for s in slices if not s.consumed] or slices


def _taylor(net: PlasticNet, loss: Loss) -> Tensor:
    parameters = [p for p in net.model.parameters() if p.is_floating_point() or p.is_complex()]
    fixed = [p for p in parameters if not p.requires_grad]  # what does not train can be cut, too
    try:
        for p in fixed:
            p.requires_grad_(True)
        with torch.enable_grad():
            f = _dependent(passes.run(net, loss, passes.Pass()))
            gradients = torch.autograd.grad(f.mean(), parameters, allow_unused=True)
    finally:
        for p in fixed:
            p.requires_grad_(False)
    of = dict(zip(parameters, gradients, strict=True))

    def product(p: nn.Parameter) -> Tensor:
        g = of.get(p)
        return torch.zeros_like(_real(p)) if g is None else _real(g) * _real(p)

    return _sums(net, product).square()


def _gate(net: PlasticNet, loss: Loss) -> Tensor:
    if (
        all(net._gating.per_sample.values())
        and net.gates_mode != "batch"
        and not passes.uses_batch_statistics(net.model)
    ):
        try:
            return _gate_squares(net, loss, apart=True)
        except PlasticError:  # rows that are not samples; whatever else is wrong will be said again
            pass
    return _gate_squares(net, loss, apart=False)


def _gate_squares(net: PlasticNet, loss: Loss, *, apart: bool) -> Tensor:
    """The squared derivatives with respect to the gates, of each sample's own, or of the batch's."""
    now, weights, calls = net._mean_gates()[0], mean_weights(net), list[Tensor]()

    def gates(rows: int) -> Tensor:
        calls.append(now.expand(rows if apart else 1, -1).clone().requires_grad_())
        return calls[-1]

    k = net._k
    try:
        net.training, net._k = True, 1.0  # then it takes the gates that it is given; its modules stay as they are
        with torch.enable_grad(), _gated_blocks(net, lambda: calls[-1][0]):
            f = _dependent(passes.run(net, loss, passes.Pass("probe", probe=gates, weights=weights)))
            found = torch.autograd.grad(f.sum(), calls, materialize_grads=True)
    finally:
        net.training, net._k = False, k
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

    handles = [m.register_forward_hook(mixing(i), with_kwargs=True) for m, i in net._gating._blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dependent(f: Tensor) -> Tensor:
    if not f.requires_grad:
        raise PlasticError("scores that follow a gradient need a loss that depends on the network: from net(x)")
    return f


def resolve(net: PlasticNet, given: Scores, loss: Loss | None) -> dict[str, np.ndarray]:
    """The scores of this kind, or those that were given, as arrays of shape (units,)."""
    found = given if isinstance(given, Mapping) else scores(net, given, loss)
    worth: dict[str, np.ndarray] = {}
    for name, site in net.sites.items():
        values = torch.as_tensor(found[name]).detach().cpu().double() if name in found else torch.zeros(0)
        if values.shape != (len(site),) or not bool(torch.isfinite(values).all()):
            raise PlasticError(
                f"site {name!r}: the scores have shape {tuple(values.shape)} or are not finite; needed is a number for "
                f"each unit, shape ({len(site)},), as from pn.scores"
            )
        worth[name] = values.numpy()
    return worth
