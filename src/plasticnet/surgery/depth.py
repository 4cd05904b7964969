"""Depth: blocks that sleep, and how they wake, so that a network begins with few blocks and gets others as it grows.

A block that sleeps is closed, is not run and costs nothing, and the same holds for the units within it. Its parameters
stay in the model, so that state dicts keep their layout. When it wakes it begins anew: with the widths that the blocks
beside it have, with random weights, and as the identity, since the layers at the ends of its branches are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import nn
from torch.optim import Optimizer

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import ASLEEP, INITIAL_LOGIT, OPEN_LOGIT, Site, set_logits
from plasticnet.surgery.optimizers import check_optimizers, forget
from plasticnet.surgery.plan import Sources
from plasticnet.tracing.identity import ends_of
from plasticnet.units import BlockUnits, InputUnits, is_skipped


def put_to_sleep(net: GatedModel, first: int) -> None:
    """Let all but the first blocks of every site of blocks sleep.

    Args:
        net: The network.
        first: How many blocks of each site stay open.
    """
    for site in _block_sites(net).values():
        site.grace[first:] = ASLEEP
        set_logits(site, slice(first, None), -INITIAL_LOGIT)
    for site, _ in _within(net, _asleep(net)):
        site.grace.fill_(ASLEEP)
    net.refresh()


def check_sleep(net: GatedModel, first: int) -> None:
    """Raise `PlasticError` unless all but the first blocks of every site can sleep, and later wake as the identity.

    Args:
        net: The network.
        first: How many blocks of each site stay open.
    """
    found = _block_sites(net)
    if type(first) is not int or first < 1:
        raise PlasticError(f"cannot start from blocks={first!r} a site; a whole number, at least 1, is needed")
    if not found:
        raise PlasticError(
            "narrow(blocks=...) closes whole blocks, and this network has none: name them when it is made, as in "
            'PlasticNet(model, ..., blocks=["layer*.[12]"]), or leave blocks= out'
        )
    stuck = [b for u in found.values() for b, ends in list(zip(_blocks(u), _ends(u), strict=True))[first:] if not ends]
    if stuck:
        raise PlasticError(
            f"{', '.join(stuck[:5])}: no layer, and no two of them, make this block return its first input when their "
            "weights and biases are zero, so that it cannot begin as the identity. Leave it out of the blocks= of "
            "PlasticNet; or leave the blocks= of narrow out, and depth will only be pruned"
        )


def wake(
    net: GatedModel,
    counts: Mapping[str, int],
    optimizers: Sequence[Optimizer],
    resize: Callable[[Sources], None],
    grace: int = 0,
) -> None:
    """Open the next blocks that sleep, which begin anew as the identity.

    The optimizers forget all that they know of the parameters of these blocks.

    Args:
        net: The network.
        counts: How many blocks of each site of blocks wake.
        optimizers: The optimizers that hold the parameters.
        resize: Resizes the network by the units that stay in each site, and -1 for new ones.
        grace: For how many epochs of the schedule the blocks, and the units within, are held open and unpriced.

    Raises:
        PlasticError: Fewer blocks sleep, or the optimizers cannot be resized. Nothing was changed.
    """
    check_wake(net, counts)
    places = {name: net.sites[name].asleep.nonzero()[:, 0].tolist()[:n] for name, n in counts.items()}
    check_optimizers(optimizers, dict(net.named_parameters()))
    blocks = [_blocks(net.sites[name])[i] for name, some in places.items() for i in some]
    woken = _within(net, blocks)
    resize(_as_beside(net, woken))
    with net.ranks.alike(net.like.device):
        for block in blocks:
            begin_anew(net.model.get_submodule(block))
    opened = OPEN_LOGIT / net.k if 0 < net.k < math.inf else INITIAL_LOGIT
    with torch.no_grad():
        for name, some in places.items():
            site = net.sites[name]
            for end in [end for i in some for end in _ends(site)[i] or ()]:
                for p in ends_of(net.model.get_submodule(end)):
                    p.zero_()
            site.grace[some] = grace
            set_logits(site, torch.tensor(some, device=site.phi.device), opened)
            forget(optimizers, site.phi, torch.tensor(some, device=site.phi.device))
        for site, _ in woken:
            site.grace.fill_(grace)
            set_logits(site, slice(None), opened)
    for p in [p for block in blocks for p in net.model.get_submodule(block).parameters()]:
        p.grad = None
        for optimizer in optimizers:
            optimizer.state.pop(p, None)
    for site, _ in woken:
        for optimizer in optimizers:
            optimizer.state.pop(site.phi, None)
    net.refresh()


def check_wake(net: GatedModel, counts: Mapping[str, int]) -> None:
    """Raise `PlasticError` unless so many blocks of these sites sleep."""
    for name, n in counts.items():
        if n > (asleep := net.sites[name].spare):
            raise PlasticError(
                f"site {name!r}: {n} blocks were to open, but {asleep} sleep; narrow(net, units, blocks=...) puts "
                "blocks to sleep before a training"
            )


def begin_anew(part: nn.Module) -> None:
    """Let all modules of a part of a model initialise themselves that have a method ``reset_parameters``.

    Modules whose parameters do not train are left alone.
    """
    for module in part.modules():
        reset = getattr(module, "reset_parameters", None)
        own = list(module.parameters(recurse=False))
        if callable(reset) and (not own or any(p.requires_grad for p in own)):
            reset()


def _as_beside(net: GatedModel, woken: Sequence[tuple[Site, str]]) -> dict[str, list[int]]:
    """Return how to resize the sites within blocks that wake, to the mean width of the same sites in open blocks.

    Args:
        net: The network.
        woken: The sites within the blocks, each with its block.
    """
    sources: dict[str, list[int]] = {}
    for site, block in woken:
        beside = next(_blocks(s) for s in _block_sites(net).values() if block in _blocks(s))
        same = [net.sites.get(f"{other}{site.name.removeprefix(block)}") for other in beside]
        widths = [len(s) for s in same if s is not None and s.awake]
        if not widths:
            continue
        most = site.units.full if isinstance(site.units, InputUnits) else math.inf
        width = int(min(max(1, round(fmean(widths))), most if site.units.growable else len(site)))
        if width != len(site):
            sources[site.name] = [*range(min(width, len(site))), *[-1] * (width - len(site))]
    return sources


def _block_sites(net: GatedModel) -> dict[str, Site]:
    """Return the sites of blocks by name, without those of experts, which never sleep."""
    return {name: site for name, site in net.sites.items() if is_skipped(site.units)}


def _blocks(site: Site) -> tuple[str, ...]:
    """Return the names of the blocks of a site."""
    assert isinstance(site.units, BlockUnits)
    return site.units.blocks


def _ends(site: Site) -> tuple[tuple[str, ...] | None, ...]:
    """Return for each block of a site the modules at the ends of its branches."""
    assert isinstance(site.units, BlockUnits)
    return site.units.ends


def _asleep(net: GatedModel) -> list[str]:
    """Return the names of the blocks that sleep."""
    sites = _block_sites(net).values()
    return [block for s in sites for block, asleep in zip(_blocks(s), s.asleep.tolist(), strict=True) if asleep]


def _within(net: GatedModel, blocks: Sequence[str]) -> list[tuple[Site, str]]:
    """Return the sites of which all slices lie within one of these blocks, each with the block."""
    found: list[tuple[Site, str]] = []
    for site in net.sites.values():
        tensors = [s.virtual[0] if s.virtual is not None else s.tensor for s in site.units.slices]
        own = (b for b in blocks if tensors and all(f"{t}.".startswith(f"{b}.") for t in tensors))
        found += [(site, block) for block in own]
    return found
