"""Makes an untrained network narrow, and shallow on request, so that it can grow from there."""

from __future__ import annotations

from typing import Any

import torch

from plasticnet.budgets.floors import keep_signal
from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.surgery.depth import begin_anew, check_sleep, put_to_sleep
from plasticnet.surgery.undo import undone_on_error
from plasticnet.units import InputUnits


def narrow(net: PlasticNet, units: int, *, blocks: int | None = None) -> None:
    """Make an untrained network narrow, so that it can grow from there.

    Every site that can grow and has more than ``units`` units is cut to its first ``units`` ones; an input site keeps
    ``units`` features at random. Then all modules with a method ``reset_parameters`` initialise themselves for the new
    widths, which overwrites their weights; modules whose parameters do not train are left alone.

    With ``blocks``, all but the first so many blocks of every site of blocks (see the ``blocks`` of `PlasticNet`)
    sleep: they are closed, are not run and cost nothing. `Growth` opens them one after the other where that pays, each
    as the identity. So the model has the largest depth.

    What refers to the network as it is, such as a share in a `Budget` or ``Pressure(relative_to=net)``, refers to the
    narrow network afterwards. Ask before: `Budget.absolute` fixes the shares.

    Args:
        net: The network. Build its optimizers afterwards.
        units: The number of units that sites keep, 1 or more.
        blocks: The number of blocks of each site that stay open, 1 or more; None leaves depth alone.

    Raises:
        PlasticError: A number is not a whole number from 1 on; the network is no `PlasticNet`; or it has no blocks, or
            one that would sleep cannot begin as the identity. Nothing was changed, as when the call is interrupted.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> net = pn.PlasticNet(model, (torch.randn(8, 4),))
        >>> pn.narrow(net, 2)
        >>> model[0]
        Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(net, PlasticNet):
        raise PlasticError(
            f"narrow takes a PlasticNet, not a {type(net).__name__}: narrow(pn.PlasticNet(model, ...), 3)"
        )
    if type(units) is not int or units < 1:
        raise PlasticError(f"cannot start from {units!r} units a site; a whole number, at least 1, is needed")
    if blocks is not None:
        check_sleep(net, blocks)
    with net.lock, undone_on_error(net, [], [net.sampler], net.model.parameters()):
        _narrowed(net, units, blocks)


def _narrowed(net: PlasticNet, units: int, blocks: int | None) -> None:
    """Do what `narrow` does, in a network that is locked."""
    # Sites that cannot grow would stay narrow for good.
    wide = {n: s for n, s in net.sites.items() if len(s) > units and s.units.growable}
    channels = {n: list(range(units)) for n, s in wide.items() if not _selects(s)}
    net.resize(channels)
    features = {n: _spread(len(s), units) for n, s in net.sites.items() if len(s) > units and _selects(s)}
    net.resize(features)
    keep_signal(net)
    begin_anew(net.model)
    if blocks is not None:
        put_to_sleep(net, blocks)


def _selects(site: Any) -> bool:
    """Return whether the units of a site are features of a layer's input."""
    return isinstance(site.units, InputUnits)


def _spread(n: int, units: int) -> list[int]:
    """Return ``units`` of the first ``n`` numbers at random, in increasing order."""
    return sorted(torch.randperm(n)[:units].tolist())
