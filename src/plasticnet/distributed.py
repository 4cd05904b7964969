"""Several processes: what `DistributedDataParallel` (DDP) must know of a network whose size changes.

DDP averages the gradients that it sees come into being in the backward pass of the model. The gates
get theirs from the loss alone, so they are taken out of its hands, and their estimates are averaged
here; each rank draws gates of its own. So are buffers, which become those of rank 0 before each
training pass: after a pass without gradients, such as the partner's, DDP leaves that out. All else that
could make the ranks differ in size is equal by construction: what a resize draws at random comes from
one seed, and a schedule decides by the mean validation loss.

The process group is the default one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.units import InputUnits

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet

T = TypeVar("T")


def wrap(net: PlasticNet) -> list[str]:
    """The names of the gates and of all buffers, which DDP is to ignore. It asks for them as it wraps
    the network."""
    if _initialised():  # something else may ask, too
        net._wrapper = "new"
    inner = getattr(net.model, "_ddp_params_and_buffers_to_ignore", ())
    own = {g.phi for g in net._gated()}
    gates = [name for name, p in net.named_parameters() if p in own]
    return [*gates, *(name for name, _ in net.named_buffers()), *(f"model.{name}" for name in inner)]


def outgrow(net: PlasticNet) -> None:
    """Note that parameters were replaced: the hooks of a wrapper hang on the old ones."""
    if net._wrapper != "none":
        net._wrapper = "stale"


def enter(net: PlasticNet) -> None:
    """To be called before every run of the model in training mode: makes its buffers those of rank 0, and
    the gates (and what decides with them, a measured latency) when it has just been wrapped, as DDP does with
    what it does not ignore.

    Raises `PlasticError` when the network changed its size since it was wrapped, and when it is not the
    same on all ranks.
    """
    if net._wrapper == "stale" and _initialised():
        raise PlasticError(
            "the network changed its size since it was wrapped in DistributedDataParallel; wrap it again "
            "(Schedule(on_resize=...) is called at the right time)"
        )
    if net._wrapper == "growing":  # the loss by which candidates are judged: nothing of it stays
        return
    if not torch.is_grad_enabled():  # the partner's pass, and others that are undone
        return
    if _ranks(net) > 1:
        ignored = getattr(net.model, "_ddp_params_and_buffers_to_ignore", ())
        _broadcast([b for name, b in net.model.named_buffers() if name not in ignored])
        if net._wrapper == "new":
            _broadcast([g.phi for g in net._gated()])
            if (latency := first(net, net._latency)) != net._latency:
                net._use_latency(latency)
            _compare_features(net)  # last: it may raise on one rank only
    if net._wrapper == "new":
        net._wrapper = "current"


def _broadcast(tensors: list[Tensor]) -> None:
    """Overwrite with the values of rank 0. A graph that waits for its backward pass does not count this as
    a change."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t.data for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.broadcast(flat, 0)
        for t, new in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(new.view_as(t))


def _compare_features(net: PlasticNet) -> None:
    for site in net._sites():
        if isinstance(site.units, InputUnits):
            own = torch.from_numpy(site.units.features).to(site.phi.device)
            first = own.clone()
            dist.broadcast(first, 0)
            if not torch.equal(own, first):
                raise PlasticError(
                    f"site {site.name!r} has other features than on rank 0; set the same seed on all ranks before "
                    "`narrow`, and load the same state"
                )


def average(net: PlasticNet, tensor: Tensor) -> Tensor:
    """``tensor``, on the network's device, made the mean over all ranks in place; as it is where the
    network is not wrapped. All ranks must call it alike."""
    ranks = _ranks(net)
    if ranks > 1:
        dist.all_reduce(tensor)
        tensor /= ranks
    return tensor


def mean(net: PlasticNet, value: float) -> float:
    """The mean of a number over all ranks; the number itself where the network is not wrapped."""
    if _ranks(net) == 1:
        return value
    return float(average(net, torch.tensor(value, dtype=torch.float64, device=net._like.device)))


def first(net: PlasticNet, value: T) -> T:
    """What rank 0 has for ``value``; the value itself where the network is not wrapped."""
    if _ranks(net) == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


@contextmanager
def alike(net: PlasticNet) -> Iterator[None]:
    """Within this context all ranks draw the same random numbers, from a seed of rank 0; afterwards
    each goes on with its own."""
    if _ranks(net) == 1:
        yield
        return
    device = net._like.device
    seed = torch.randint(2**62, (1,)).to(device)
    dist.broadcast(seed, 0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(int(seed))
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(int(seed))
        yield


def _ranks(net: PlasticNet) -> int:
    """How many processes train this network together."""
    return dist.get_world_size() if net._wrapper != "none" and _initialised() else 1


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
