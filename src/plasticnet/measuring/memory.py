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
    """Within this context, every storage that an operation makes is followed until it is freed.

    Attributes:
        live: The bytes of all such storages that are alive now.
        current: The name of the module that started last, or None before the first one.
        peaks: For each module the most bytes that were alive at a time, from its start until the next one starts. The
            value at None is that before the first module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.current: str | None = None
        self.peaks: dict[str | None, int] = defaultdict(int, {None: 0})
        self._known: dict[int, weakref.ref[Any]] = {}

    def start(self, name: str) -> None:
        """Note that the module of this name starts."""
        self.current = name
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, made=True)
        self._note()
        return out

    def _note(self) -> None:
        """Raise the peak of the current module to what is alive now."""
        self.peaks[self.current] = max(self.peaks[self.current], self.live)

    def _meet(self, tree: Any, made: bool) -> None:
        """Follow the storages in ``tree``, and count their bytes if an operation has just made them.

        A storage that an operation was given, and that is not known yet, existed before this context and counts 0.
        """
        for storage in storages_of(tree_leaves(tree)):
            key = storage_key(storage)
            if key not in self._known:
                size = storage.nbytes() if made else 0
                self.live += size
                self._known[key] = weakref.ref(storage, partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: Any) -> None:
        """Stop counting a storage that was freed."""
        self.live -= size
        del self._known[key]


def storages_of(leaves: Any) -> list[torch.UntypedStorage]:
    """Return the storages of the tensors among ``leaves``; a sparse tensor (COO) has one for each of its parts."""
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    sparse = [part for t in tensors if t.layout == torch.sparse_coo for part in sparse_parts(t)]
    return [t.untyped_storage() for t in (*tensors, *sparse) if t.layout == torch.strided]
