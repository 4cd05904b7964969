"""Lets a run of a model begin where an earlier one on the same inputs has ended.

A run is recorded up to the operation at which it is to begin anew. Of the results of the operations before it, only
those are kept that something still holds there, which are what the rest of the model can read. In the next run these
operations are not computed: each returns what it has returned before, or, where nothing holds that, a tensor of the
same shape without content. So a pass through the layers one by one costs little more than a single run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import TensorWeakRef

from plasticnet.tools.torch_private import version


class Diverged(BaseException):  # not an Exception, because a model may catch those
    """Says that a run does not call the operations that were recorded."""


class _Result:
    """One result of a recorded operation: a tensor that is kept only while something else holds it, or any other value.

    Args:
        value: The result.
    """

    def __init__(self, value: Any) -> None:
        tensor = isinstance(value, Tensor)
        self._held = None if tensor else value
        self._seen = TensorWeakRef(value) if tensor else None
        self._like = (value.size(), value.stride(), value.dtype, value.device) if tensor else None
        self._version = 0

    def keep(self) -> Tensor | None:
        """Hold the tensor from now on, if something else still does, and return it."""
        if self._seen is not None and (tensor := self._seen()) is not None:
            self._held, self._version = tensor, version(tensor)
            return tensor
        return None

    @property
    def changed(self) -> bool:
        """Whether the tensor was changed in place since it is held."""
        return self._like is not None and self._held is not None and version(self._held) != self._version

    def take(self) -> Any:
        """Return the result, and hold its tensor no longer."""
        if self._like is None:
            return self._held
        size, stride, dtype, device = self._like
        value, self._held = self._held, None
        if value is None:
            self._seen = None
            return torch.empty_strided(size, stride, dtype=dtype, device=device)
        value = torch.ops.aten.alias.default(value)  # because autograd would not take the same tensor as a view twice
        self._seen = TensorWeakRef(value)
        return value


@dataclass(eq=False)
class Record:
    """What a run has computed before the operation at which the next one is to begin.

    Attributes:
        batch: The inputs. The model may have changed them in place, as the rest of it expects them.
        steps: For each operation the operation, its results, and how they are nested; or None twice, where it is
            computed again.
        bytes: The memory of the results that are kept.
        whole: Whether a run has reached the operation, so that the next one can begin there.
    """

    batch: Any
    steps: list[tuple[Any, list[_Result] | None, TreeSpec | None]] = field(default_factory=list)
    bytes: int = 0
    whole: bool = False

    def add(self, func: Any, out: Any) -> None:
        """Add an operation and what it has returned."""
        leaves, spec = tree_flatten(out)
        self.steps.append((func, [_Result(leaf) for leaf in leaves], spec))

    def add_again(self, func: Any) -> None:
        """Add an operation that every run computes, such as the view of a parameter, which may be another one then."""
        self.steps.append((func, None, None))

    def take(self, at: int, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation has returned before.

        Args:
            at: The number of the operation.
            func: The operation.
            args: Its arguments.
            kwargs: Its arguments by keyword.

        Raises:
            Diverged: It was another operation.
        """
        recorded, results, spec = self.steps[at]
        if recorded is not func:
            raise Diverged
        if results is None or spec is None:
            return func(*args, **kwargs)
        return tree_unflatten([r.take() for r in results], spec)

    def _results(self) -> Iterator[_Result]:
        """Yield the results of all operations."""
        for _, results, _ in self.steps:
            yield from results or ()

    def close(self) -> None:
        """Keep what something holds at this moment, the one at which the next run is to begin."""
        kept = [t for r in self._results() if (t := r.keep()) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        self.bytes, self.whole = sum(storages.values()), True

    @property
    def usable(self) -> bool:
        """Whether the next run can begin where this one was closed: nothing that is kept was changed since."""
        return self.whole and not any(r.changed for r in self._results())
