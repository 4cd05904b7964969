"""Sums over the parameters of each unit: the magnitude of its weights, or what a gradient says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from plasticnet.gates.gated import GatedModel
from plasticnet.units import BlockUnits, Slice, Units


def in_double(t: Tensor) -> Tensor:
    """In double precision; a complex number as two real ones."""
    t = t.detach()
    return (torch.view_as_real(t) if t.is_complex() else t).double()


def sums_by_unit(net: GatedModel, value: Callable[[nn.Parameter], Tensor]) -> Tensor:
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
