"""Follows the memory that operations allocate while a model runs."""

from __future__ import annotations

import weakref
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plasticnet.tools.torch_private import sparse_parts, storage_key


class MemoryMode(TorchDispatchMode):
    """Follows the storages that operations make for as long as they live.

    ``peaks`` are the most bytes that were alive at a time, from the start of each module until the next one
    starts (None: until the first one)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.current: str | None = None
        self.peaks: dict[str | None, int] = defaultdict(int, {None: 0})
        self._known: dict[int, weakref.ref[Any]] = {}

    def start(self, name: str) -> None:
        """The module of this name starts."""
        self.current = name
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, made=True)
        self._note()
        return out

    def _note(self) -> None:
        self.peaks[self.current] = max(self.peaks[self.current], self.live)

    def _meet(self, tree: Any, made: bool) -> None:
        """Count what an operation made. What it was given and is not known was there before."""
        for storage in storages_of(tree_leaves(tree)):
            key = storage_key(storage)
            if key not in self._known:
                size = storage.nbytes() if made else 0
                self.live += size
                self._known[key] = weakref.ref(storage, partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self._known[key]


def storages_of(leaves: Any) -> list[torch.UntypedStorage]:
    """The memory behind the tensors among ``leaves``; that of a sparse tensor is spread over its parts."""
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    sparse = [part for t in tensors if t.layout == torch.sparse_coo for part in sparse_parts(t)]
    return [t.untyped_storage() for t in (*tensors, *sparse) if t.layout == torch.strided]
