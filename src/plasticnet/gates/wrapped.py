"""What `DistributedDataParallel` (DDP) must know of a network whose size changes.

DDP averages the gradients that it sees come into being in the backward pass of the model. The gates get
theirs from the loss alone, so they are taken out of its hands, and their estimates are averaged by
`Ranks`; each rank draws gates of its own. Buffers become those of rank 0 before each training pass:
after a pass without gradients, such as the partner's, DDP leaves that out. All else that could make the
ranks differ in size is equal by construction: what a resize draws at random comes from one seed, and a
schedule decides by the mean validation loss.
"""

from __future__ import annotations

import torch

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.tools.ranks import Wrapper
from plasticnet.tools.torch_private import ignored_by_ddp
from plasticnet.units import InputUnits


def ignored_names(net: GatedModel) -> list[str]:
    """The names of the gates and of all buffers, which DDP is to ignore. It asks for them as it wraps the network."""
    net.ranks.wrap()
    inner = ignored_by_ddp(net.model)
    own = {g.phi for g in net.all_gates()}
    gates = [name for name, p in net.named_parameters() if p in own]
    return [*gates, *(name for name, _ in net.named_buffers()), *(f"model.{name}" for name in inner)]


def enter(net: GatedModel) -> None:
    """Make the buffers those of rank 0, and the gates (and what decides with them, a measured latency) when the
    network has just been wrapped, as DDP does with what it does not ignore. This is called before every run of the
    model in training mode.

    Raises `PlasticError` when the network changed its size since it was wrapped, and when it is not the
    same on all ranks.
    """
    ranks = net.ranks
    if ranks.wrapper is Wrapper.STALE and ranks.initialised and not ranks.aside:
        raise PlasticError(
            "the network changed its size since it was wrapped in DistributedDataParallel; wrap it again "
            "(Schedule(on_resize=...) is called at the right time)"
        )
    if ranks.aside or not torch.is_grad_enabled():  # nothing of the pass stays: the partner's, say
        return
    if ranks.count > 1:
        ignored = ignored_by_ddp(net.model)
        ranks.broadcast([b for name, b in net.model.named_buffers() if name not in ignored])
        if ranks.wrapper is Wrapper.NEW:
            ranks.broadcast([g.phi for g in net.all_gates()])
            if (latency := ranks.first(net.latency)) != net.latency:
                net.use_latency(latency)
            _compare_features(net)  # last: it may raise on one rank only
    ranks.settle()


def _compare_features(net: GatedModel) -> None:
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
