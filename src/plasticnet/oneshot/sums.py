"""Sums over the parameters of each unit: of the squares of its weights, or of what a gradient says about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from plasticnet.gates.gated import GatedModel
from plasticnet.tools.torch_private import BatchNorm
from plasticnet.units import BlockUnits, Slice, Units, owner


def in_double(t: Tensor) -> Tensor:
    """Return a detached tensor in double precision, with complex numbers as pairs of real ones."""
    t = t.detach()
    return (torch.view_as_real(t) if t.is_complex() else t).double()


def sums_by_unit(net: GatedModel, value: Callable[[nn.Parameter], Tensor], *, once: bool = False) -> Tensor:
    """Return the sum of a value over the parameters of each unit.

    The parameters of a unit are those that produce it; for a unit that has none, such as an input feature, they are
    those that read it. The parameters of a block are all of its parameters.

    Args:
        net: The network.
        value: Gives for a parameter a tensor of its shape; for a complex one, two numbers for every entry.
        once: Whether only the last of the parameters counts that a unit passes one after the other, which are those of
            a layer, of the BatchNorm behind it, and of a grouped convolution.

    Returns:
        The sums for the units of all sites, shape (units,), in double precision.
    """
    parameters = dict(net.model.named_parameters())
    sums: list[Tensor] = []
    for site in net.sites.values():
        total = torch.zeros(len(site), dtype=torch.float64, device=site.phi.device)
        if isinstance(site.units, BlockUnits):
            for name, p in parameters.items():
                if (i := site.units.inside(name)) is not None:
                    total[i] += value(p).sum()
        for s in _producing(net, site.units, parameters, once):
            along = value(parameters[s.tensor]).transpose(0, s.dim)
            total += along.reshape(len(along), -1).sum(1)[torch.from_numpy(s.index).to(total.device)].sum(1)
        sums.append(total)
    return torch.cat(sums)


def _producing(net: GatedModel, u: Units, parameters: Mapping[str, nn.Parameter], once: bool) -> list[Slice]:
    """Return the slices that produce the units, or those that read them where none do, as for input features."""
    slices = [s for s in u.slices if s.tensor in parameters]
    producing = [s for s in slices if not s.consumed]
    if not once:
        return producing or slices
    stages = list[tuple[str, list[Slice]]]()  # of each module what produces the units, in order
    for s in producing:
        module = owner(s.tensor)
        if stages and stages[-1][0] == module:
            stages[-1][1].append(s)
            continue
        passed = s.group > 0 or isinstance(net.model.get_submodule(module), BatchNorm | nn.GroupNorm)
        if passed and stages:
            stages.pop()
        stages.append((module, [s]))
    return [s for _, found in stages for s in found] or slices
