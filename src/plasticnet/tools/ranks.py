"""Several processes that train one network together.

`Ranks` knows the `DistributedDataParallel` (DDP) in which the network runs, however deep the network lies in what DDP
wraps, or the mesh over which FSDP2 (``fully_shard``) shards it. It keeps the copies of the network alike: it computes
means, broadcasts tensors, lets all ranks draw equal random numbers, and lets DDP watch new parameters. It works on
tensors and numbers and knows no network.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plasticnet.tools.torch_private import process_group, running_ddp, unwatched, watch_again, watched_by_ddp

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Ranks:
    """The processes that train a network together; this is a single one unless the network runs in DDP or is sharded.

    A copy belongs to no DDP, and so trains alone.

    Attributes:
        fresh: Whether the network was wrapped and has not yet been made equal on all ranks.
        aside: Whether the present run leaves nothing behind, so that buffers need not be equal.
    """

    def __init__(self) -> None:
        self.fresh = False
        self.aside = False
        self._asked = False  # Somebody, DDP most likely, has asked for the names that it is to ignore.
        self._ddp: weakref.ref[nn.Module] | None = None
        self._mesh: DeviceMesh | None = None  # over which FSDP2 shards the network
        self._outgrown = False  # Shapes have changed since a DDP may have been built.
        self._watched: set[int] = set()  # The ids of the parameters whose gradients DDP averages.

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        return Ranks, ()

    @property
    def ddp(self) -> nn.Module | None:
        """The `DistributedDataParallel` in which the network runs, once it has run in it."""
        return None if self._ddp is None else self._ddp()

    @property
    def count(self) -> int:
        """The number of processes that train this network together."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        if not (self.sharded or self._asked or self.ddp is not None):
            return 1
        return dist.get_world_size(self._group)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        """The process group of DDP or of FSDP2; None stands for the default one."""
        if self._mesh is not None:
            return None if self._mesh.size() == dist.get_world_size() else self._mesh.get_group()
        return None if self.ddp is None else process_group(self.ddp)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the network, so that every call of it must happen on all ranks alike."""
        return self._mesh is not None

    def shard(self, mesh: DeviceMesh) -> None:
        """Note over which mesh, of one dimension, FSDP2 shards the network."""
        if self._mesh is None:
            self._mesh, self.fresh = mesh, True

    def wrap(self) -> None:
        """Note that a wrapper has asked for the names that it is to ignore."""
        if dist.is_available() and dist.is_initialized():  # Otherwise something else than DDP has asked.
            self._asked = self.fresh = True

    def meet(self) -> None:
        """Note the DDP in whose forward this is called, if there is one, and let it watch all parameters it holds.

        A DDP that was built before parameters were replaced watches the old ones.
        """
        ddp = running_ddp()
        if ddp is None:
            return
        if ddp is not self.ddp:
            self._ddp, self.fresh = weakref.ref(ddp), True
            self._watched = watched_by_ddp(ddp)
        if self.fresh and (self._outgrown or unwatched(ddp)):
            self.outgrow()

    def outgrow(self) -> None:
        """Let DDP watch the parameters that have taken the place of others; its hooks hang on the old ones.

        Where the network has not run in a DDP yet, there may be one, and it is told when the network does.
        """
        self._outgrown = self.ddp is None
        if self.ddp is not None:
            watch_again(self.ddp)
            self._watched = watched_by_ddp(self.ddp)

    def replaced(self) -> None:
        """Note that parameters have taken the place of others, perhaps also outside of the network.

        DDP is told when the network runs in it for the next time, since others may still be replaced now.
        """
        self.fresh = self._outgrown = True

    def watches(self, parameter: nn.Parameter) -> bool:
        """Return whether DDP averages the gradients of a parameter."""
        return self.ddp is not None and id(parameter) in self._watched

    def average(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over all ranks, in place, and return it.

        All ranks must call this with tensors of equal shape, on the device of the network.
        """
        ranks = self.count
        if ranks > 1:
            dist.all_reduce(tensor, group=self._group)
            tensor /= ranks
        return tensor

    def mean(self, value: float, device: torch.device) -> float:
        """Return the mean of a number over all ranks; ``device`` is the device of the network."""
        if self.count == 1:
            return value
        return float(self.average(torch.tensor(value, dtype=torch.float64, device=device)))

    def first(self, value: T) -> T:
        """Return the value that rank 0 has."""
        if self.count == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, group=self._group, group_src=0)
        return found[0]

    def everywhere(self, value: T) -> list[T]:
        """Return the values of all ranks, in order."""
        if self.count == 1:
            return [value]
        found: list[T] = [value] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of rank 0.

        A graph that waits for its backward pass does not count this as a change.
        """
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same = [t.data for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.broadcast(flat, group=self._group, group_src=0)
            for t, new in zip(same, flat.split([t.numel() for t in same]), strict=True):
                t.copy_(new.view_as(t))

    @contextmanager
    def alike(self, device: torch.device) -> Iterator[None]:
        """Let all ranks draw the same random numbers in this context, from a seed of rank 0.

        Afterwards each rank goes on with its own random numbers. ``device`` is the device of the network.
        """
        if self.count == 1:
            yield
            return
        seed = torch.randint(2**62, (1,)).to(device)
        self.broadcast([seed])
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(int(seed))
            if device.type == "cuda":
                torch.cuda.default_generators[device.index].manual_seed(int(seed))
            yield
