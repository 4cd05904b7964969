"""Tells `DistributedDataParallel` (DDP) what it must know of a network whose size changes.

DDP averages the gradients of parameters that take part in the forward pass of the model. The gates get their gradients
from the loss alone. So DDP is told to ignore them, and `Ranks` averages their estimates. Each rank draws gates of its
own. Before each training pass the buffers are overwritten with those of rank 0, because DDP does not do this after a
pass without gradients, such as that of a partner. Everything else that could make the ranks differ in size is equal by
construction: what a resize draws at random comes from one seed, and a schedule decides by the mean validation loss.
"""

from __future__ import annotations

import torch

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.tools.ranks import Wrapper
from plasticnet.tools.torch_private import ignored_by_ddp
from plasticnet.units import InputUnits


def ignored_names(net: GatedModel) -> list[str]:
    """Return the names of what DDP is to ignore: the gates and all buffers, and what it ignores in the model itself.

    DDP asks for these names when it wraps the network, which is noted.
    """
    net.ranks.wrap()
    inner = ignored_by_ddp(net.model)
    own = {g.phi for g in net.all_gates()}
    gates = [name for name, p in net.named_parameters() if p in own]
    return [*gates, *(name for name, _ in net.named_buffers()), *(f"model.{name}" for name in inner)]


def enter(net: GatedModel) -> None:
    """Make the network equal on all ranks; this is called before every run of the model in training mode.

    The buffers become those of rank 0. When the network has just been wrapped, its gates and its measured latency do,
    too, as DDP does with the parameters that it does not ignore.

    Args:
        net: The network.

    Raises:
        PlasticError: The network changed its size after it was wrapped, or an input site has other features than on
            rank 0.
    """
    ranks = net.ranks
    if ranks.wrapper is Wrapper.STALE and ranks.initialised and not ranks.aside:
        raise PlasticError(
            "the network changed its size since it was wrapped in DistributedDataParallel; wrap it again "
            "(Schedule(on_resize=...) is called at the right time)"
        )
    if ranks.aside or not torch.is_grad_enabled():  # the pass leaves nothing behind, as that of a partner
        return
    if ranks.count > 1:
        ignored = ignored_by_ddp(net.model)
        ranks.broadcast([b for name, b in net.model.named_buffers() if name not in ignored])
        if ranks.wrapper is Wrapper.NEW:
            ranks.broadcast([g.phi for g in net.all_gates()])
            if (latency := ranks.first(net.latency)) != net.latency:
                net.use_latency(latency)
            _compare_features(net)  # done last, because it may raise on a single rank
    ranks.settle()


def _compare_features(net: GatedModel) -> None:
    """Raise `PlasticError` if an input site has other features than on rank 0."""
    for site in net.sites.values():
        if isinstance(site.units, InputUnits):
            own = torch.from_numpy(site.units.features).to(site.phi.device)
            first = own.clone()
            net.ranks.broadcast([first])
            if not torch.equal(own, first):
                raise PlasticError(
                    f"site {site.name!r} has other features than on rank 0; set the same seed on all ranks before "
                    "`narrow`, and load the same state"
                )
