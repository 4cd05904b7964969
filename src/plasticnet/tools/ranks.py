"""Several processes that train one network together.

`Ranks` knows whether `DistributedDataParallel` (DDP) has wrapped the network, and keeps the copies of the network
alike: it computes means, broadcasts tensors, and lets all ranks draw equal random numbers. It works on tensors and
numbers and knows no network. The process group is the default one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Wrapper(Enum):
    """The state of the DDP wrapper around a network."""

    NONE = "none"  # There is no wrapper: nothing has asked for the names that DDP ignores.
    NEW = "new"  # The network was wrapped and has not yet run in training.
    CURRENT = "current"  # The network was wrapped and has run since.
    STALE = "stale"  # Parameters were replaced after the network was wrapped.


class Ranks:
    """The processes that train a network together; this is a single one unless the network was wrapped.

    Attributes:
        wrapper: The state of the wrapper.
        aside: Whether the present run leaves nothing behind, so that buffers need not be equal.
    """

    def __init__(self) -> None:
        self.wrapper = Wrapper.NONE
        self.aside = False

    @property
    def initialised(self) -> bool:
        """Whether there is a process group."""
        return dist.is_available() and dist.is_initialized()

    @property
    def count(self) -> int:
        """The number of processes that train this network together."""
        return dist.get_world_size() if self.wrapper is not Wrapper.NONE and self.initialised else 1

    def wrap(self) -> None:
        """Note that a wrapper has asked for the names that it is to ignore."""
        if self.initialised:  # Without a process group, somebody else has asked for the names.
            self.wrapper = Wrapper.NEW

    def outgrow(self) -> None:
        """Note that parameters were replaced, while the hooks of a wrapper still hang on the old ones."""
        if self.wrapper is not Wrapper.NONE:
            self.wrapper = Wrapper.STALE

    def settle(self) -> None:
        """Note that a network that was just wrapped has been made equal on all ranks."""
        if self.wrapper is Wrapper.NEW:
            self.wrapper = Wrapper.CURRENT

    def average(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over all ranks, in place, and return it.

        All ranks must call this with tensors of equal shape, on the device of the network.
        """
        ranks = self.count
        if ranks > 1:
            dist.all_reduce(tensor)
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
        dist.broadcast_object_list(found)
        return found[0]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of rank 0.

        A graph that waits for its backward pass does not count this as a change.
        """
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same = [t.data for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.broadcast(flat, 0)
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
        dist.broadcast(seed, 0)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(int(seed))
            if device.type == "cuda":
                torch.cuda.default_generators[device.index].manual_seed(int(seed))
            yield
