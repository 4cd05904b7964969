"""Makes an untrained network narrow, so that it can grow from there."""

from __future__ import annotations

from typing import Any

import torch

from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.units import InputUnits


def narrow(net: PlasticNet, units: int) -> None:
    """Make an untrained network narrow, so that it can grow from there.

    Every site that can grow and has more than ``units`` units is cut to its first ``units`` ones; an input site keeps
    ``units`` features at random. Then all modules with a method ``reset_parameters`` initialise themselves for the new
    widths, which overwrites their weights.

    Args:
        net: The network. Build its optimizers afterwards.
        units: The number of units that sites keep, 1 or more.

    Raises:
        PlasticError: The number of units is less than 1. Nothing was changed.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> net = pn.PlasticNet(model, (torch.randn(8, 4),))
        >>> pn.narrow(net, 2)
        >>> model[0]
        Linear(in_features=4, out_features=2, bias=True)
    """
    if units < 1:
        raise PlasticError(f"cannot start from {units} units a site; at least 1 is needed")
    # Sites that cannot grow would stay narrow for good.
    wide = {n: s for n, s in net.sites.items() if len(s) > units and s.units.growable}
    channels = {n: list(range(units)) for n, s in wide.items() if not _selects(s)}
    net.resize(channels)
    features = {n: _spread(len(s), units) for n, s in net.sites.items() if len(s) > units and _selects(s)}
    net.resize(features)
    for module in net.model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _selects(site: Any) -> bool:
    """Return whether the units of a site are features of a layer's input."""
    return isinstance(site.units, InputUnits)


def _spread(n: int, units: int) -> list[int]:
    """Return ``units`` of the first ``n`` numbers at random, in increasing order."""
    return sorted(torch.randperm(n)[:units].tolist())
