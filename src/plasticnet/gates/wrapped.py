"""Keeps a network right in `DistributedDataParallel` (DDP) and FSDP2, whoever wraps it and however deep it lies.

DDP averages the gradients of the parameters that it found when it was built, and expects one of each. Three things are
different here. The gates get gradients from the loss alone: where DDP wraps the network itself, it is told to ignore
them, and `Ranks` averages their estimates; where it wraps a module around the network, it watches them, and the output
is tied to them. Sizes change: then DDP is told to watch the new parameters. And before each training pass the buffers
become those of rank 0, because DDP leaves that out after a pass without gradients, such as that of a partner.

FSDP2 (``fully_shard``) leaves the gates whole, and gathers the other parameters before a forward. There, too, the
estimates of the gates are averaged, and buffers are those of rank 0.

Each rank draws gates of its own. Everything else that could make the ranks differ in size is equal by construction:
what a resize draws at random comes from one seed, and a schedule decides by the mean validation loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from plasticnet.errors import PlasticError
from plasticnet.gates.acting import tied_to
from plasticnet.gates.gated import GatedModel
from plasticnet.tools.fsdp_private import sharded_parameters
from plasticnet.tools.sharding import left_whole
from plasticnet.tools.torch_private import ignored_by_ddp
from plasticnet.units import BlockUnits, InputUnits


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
    """Make the buffers those of rank 0; this is called before every run of the model in training mode that stays."""
    if net.ranks.aside or not torch.is_grad_enabled():  # the pass leaves nothing behind, as that of a partner
        return
    if net.ranks.count > 1 and not net.ranks.fresh:
        ignored = ignored_by_ddp(net.model)
        net.ranks.broadcast([b for name, b in net.model.named_buffers() if name not in ignored])


def meet(net: GatedModel) -> None:
    """Note the DDP in which the network runs. When it is new, make the network that of rank 0.

    DDP does so when it is built. What has changed since then (a resize, say) is made equal here, and so is a measured
    latency.

    Args:
        net: The network, in training mode, at the begin of its forward.

    Raises:
        PlasticError: The sites have other sizes or features than on rank 0. All ranks raise it.
    """
    ranks = net.ranks
    ranks.meet()
    if not ranks.fresh or ranks.count == 1:
        return
    ranks.fresh = False
    _compare_sites(net)
    ignored = ignored_by_ddp(net.model)
    if ranks.sharded:
        _check_sharded(net)
    held = [*left_whole(net.model).items(), *net.model.named_buffers()]
    ranks.broadcast([*(t for name, t in held if name not in ignored), *(g.phi for g in net.all_gates())])
    if (latency := ranks.first(net.latency)) != net.latency:
        net.use_latency(latency)


def _check_sharded(net: GatedModel) -> None:
    """Raise `PlasticError` if FSDP2 shards the gates, leaves out parameters, or shards what lies within a block."""
    whole = {id(p) for p in left_whole(net).values()}
    if any(id(g.phi) not in whole for g in net.all_gates()):
        raise PlasticError(
            "fully_shard has sharded the gates, which every process needs as a whole: call it with "
            "ignored_params=set(net.gates.parameters())"
        )
    for name, p in left_whole(net.model).items():
        if p.requires_grad:
            raise PlasticError(
                f"fully_shard was called for some modules of the network only, and {name} is in none of them, so that "
                "every process would train it alone: call fully_shard for the network itself, too, after its parts"
            )
    inside = {id(m): m for p in sharded_parameters(net.model) for m in p.modules}
    for block in [b for s in net.sites.values() if isinstance(s.units, BlockUnits) for b in s.units.blocks]:
        for name, module in net.model.get_submodule(block).named_modules():
            if name and id(module) in inside:
                raise PlasticError(
                    f"fully_shard was called for {block}.{name}, which lies in the block {block}, and processes that "
                    f"skip this block would not gather it with those that run it: call fully_shard for {block} as a "
                    "whole, or for what lies around it"
                )


def tied(net: GatedModel, output: Any) -> Any:
    """Return the output of a training pass so that gradients of it reach all gates that DDP watches, as zeros.

    DDP waits for the gradients of everything that it watches, and those of the gates come from the loss alone, or not
    at all. Where the gates have none, at k = 0 and infinity, the zeros go once DDP has them: an optimizer counts them.
    """
    watched = [g.phi for g in net.all_gates() if net.ranks.watches(g.phi)]

    def without_gradients() -> None:
        for phi in watched:
            phi.grad = None

    plastic = 0 < net.k < math.inf
    return tied_to(watched, output, None if plastic else without_gradients)


def _compare_sites(net: GatedModel) -> None:
    """Raise `PlasticError`, on all ranks, if a site has another size or other features than on rank 0."""
    own = {
        name: site.units.features.tolist() if isinstance(site.units, InputUnits) else len(site)
        for name, site in net.sites.items()
    }
    first, *others = net.ranks.everywhere(own)
    for other in others:
        for name in first.keys() | other.keys():
            if first.get(name) != other.get(name):
                what = "features" if isinstance(first.get(name), list) else "units"
                raise PlasticError(
                    f"site {name!r} has other {what} than on rank 0; set the same seed on all ranks before `narrow`, "
                    "and load the same state"
                )
