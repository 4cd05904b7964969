"""Keeps as many units as it takes to tell the outputs apart.

The units that the output layer reads are all that it knows of an input. Where a budget leaves one or two of them, no
training brings ten classes back, however many units other layers have. A budget may not notice this in time, because
such a cut is cheap when it is made and dear only later.
"""

from __future__ import annotations

from plasticnet.gates.gated import GatedModel
from plasticnet.units import READ, BlockUnits

_SHARE = 8  # a floor is at most the width over this number: a layer that was narrow from the start knows better


def keep_signal(net: GatedModel) -> None:
    """Give every site that an output layer reads its usual minimum.

    It is the number of binary digits that number the outputs of this layer and none of them, but at most an eighth of
    the units.

    Args:
        net: The network, as it is attached or made narrow.

    Example:
        >>> import torch, plasticnet as pn
        >>> layers = torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        >>> net = pn.PlasticNet(torch.nn.Sequential(*layers), (torch.zeros(2, 4),))  # it calls keep_signal
        >>> net.sites["0"].minimum  # one number could not tell ten classes apart
        4
    """
    for site in net.sites.values():
        if isinstance(site.units, BlockUnits):
            continue
        outputs = [_outputs(net, c.tensor, c.dim) for c in site.units.consumers if net.frozen.get(c.module) == READ]
        if outputs:
            site.usual_minimum = max(site.units.least, min(max(outputs).bit_length(), len(site) // _SHARE))


def _outputs(net: GatedModel, tensor: str, dim: int) -> int:
    """Return how many outputs a weight computes, which is summed over this dimension."""
    shape = net.model.get_parameter(tensor).shape
    return shape[1 - dim] if len(shape) > 1 and dim < 2 else 1
