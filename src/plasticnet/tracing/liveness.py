"""Finds out which operations had a part in what is read of a model, so that a statistic for a log freezes nothing.

What an operation computes can reach a caller in these ways: in the model's output, in a value that Python reads, in a
shape that depends on values, in a tensor that a later run reads, or in a gradient. An operation that has none of these
ways changes nothing that anyone reads, whatever it does with channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from plasticnet.tools.torch_private import is_transformed, made_of_tensors, storage_key, writes_silently

Frozen = tuple[np.ndarray, str]

# Methods by which Python reads the values of a tensor without an operation.
_READING = frozenset(
    {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__dlpack__}
)


# Operations whose results tell Python something of the values, beside those whose result is no tensor.
_TELLING = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})
_READ = -1  # a number that stands for what is read in any case


@dataclass
class _Operation:
    """One operation: the numbers of what it read and wrote, the results, and what it froze."""

    read: frozenset[int]
    written: frozenset[int]
    results: list[TensorWeakRef]
    frozen: list[Frozen] = field(default_factory=list)


class Liveness:
    """Follows memory through the operations of one or several runs of a model.

    Tensors and their memory are numbered. What is written to memory may be read through any tensor that lies there, and
    a view that nobody reads has no part in anything.

    Attributes:
        differentiated: Whether the model took a gradient, through which anything can reach anything.
    """

    def __init__(self) -> None:
        self.differentiated = False
        self._operations: list[_Operation] = []
        self._tensors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._memory: dict[int, int] = {}  # the number of the memory at each address, of what was last seen there
        self._count = 0
        self._live = {_READ}

    def note(self, func: Any, read: Sequence[Tensor], out: Any, frozen: list[Frozen]) -> None:
        """Note an operation after it has run.

        Args:
            func: The operation.
            read: The tensors among its arguments.
            out: Its result.
            frozen: What its rule has frozen.
        """
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        sources = {self._address(t) for t in read} - {None}
        taken = frozenset(n for t in read for n in self._numbers(t))
        opaque = any(self._address(t) is None for t in (*read, *results))  # what shares their memory is not known
        telling = opaque or not results or not _TELLING.isdisjoint(func.tags)
        written = {_READ} if telling else set[int]()
        for t in results:
            address = self._address(t)
            if address is not None and address not in sources:
                self._memory.pop(address, None)  # it was freed and is another one now
            tensor, *memory = self._numbers(t)
            is_view = address in sources and not any(t is other for other in read)
            written.update((tensor,) if is_view else (tensor, *memory))
        if writes_silently(func):
            written |= taken
        self._operations.append(_Operation(taken, frozenset(written), [TensorWeakRef(t) for t in results], frozen))

    def reads(self, tensors: Sequence[Tensor]) -> None:
        """Note that someone reads the values of these tensors."""
        self._live.update(n for t in tensors for n in self._numbers(t))

    def watching(self) -> TorchFunctionMode:
        """Return a context in which values count as read where Python reads them without an operation."""
        return _Watching(self)

    def shares_memory(self, a: Tensor, b: Tensor) -> bool:
        """Return whether two tensors lie in the same memory, as a view and what it is a view of."""
        address = self._address(a)
        return address is not None and address == self._address(b)

    def take(self, everything: bool = False) -> list[Frozen]:
        """Return what operations have frozen that had a part in what is read, in order, each only once.

        Args:
            everything: Whether all that will have been read is unknown, so that all operations count from now on.
        """
        self.differentiated |= everything
        found: list[Frozen] = []
        for operation in self._reached():
            found += operation.frozen
            operation.frozen = []
        return found

    def lingers(self) -> bool:
        """Return whether something outlives the run that nobody has read, and that follows from a frozen operation."""
        tainted: set[int] = set()
        for operation in self._operations:
            if operation.frozen or not tainted.isdisjoint(operation.read):
                tainted |= operation.written
                if any(result() is not None for result in operation.results):
                    return True
        return False

    def _reached(self) -> list[_Operation]:
        """Return the operations that had a part in what is read, in order."""
        if self.differentiated:
            return self._operations
        live, found = set(self._live), []
        for operation in reversed(self._operations):
            if not live.isdisjoint(operation.written):
                live |= operation.read
                found.append(operation)
        return found[::-1]

    def _numbers(self, t: Tensor) -> tuple[int, ...]:
        """Return the number of a tensor, and that of its memory where it has any. They get one when first seen."""
        if t not in self._tensors:
            self._count += 1
            self._tensors[t] = self._count
        address = self._address(t)
        if address is None:
            return (self._tensors[t],)
        if address not in self._memory:
            self._count += 1
            self._memory[address] = self._count
        return self._tensors[t], self._memory[address]

    def _address(self, t: Tensor) -> int | None:
        """Return what tells the memory of a tensor from that of others, or None for one that has none of its own."""
        if t.layout != torch.strided or is_transformed(t) or made_of_tensors(t):
            return None
        return storage_key(t.untyped_storage())


class _Watching(TorchFunctionMode):
    """Tells a liveness which values Python reads without an operation."""

    def __init__(self, liveness: Liveness) -> None:
        super().__init__()
        self.liveness = liveness

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            self.liveness.reads([t for t in args if isinstance(t, Tensor)])
        return func(*args, **(kwargs or {}))
