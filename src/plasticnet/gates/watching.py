"""What follows a call of the model until the first gate acts; `learning/prefix.py` hands over what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor


class Watch(Protocol):
    """A context around one call of the model that follows its functions until the first gate acts."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...

    def end(self, *_: Any) -> None:
        """Note that the first gate acts."""
        ...

    def interrupt(self) -> None:
        """Note that the next part of the model will run again in the backward pass, and so must not be handed over."""
        ...

    def output(self, output: Any) -> Any:
        """Take what the model returns, and return it."""
        ...


# It makes a watch from the tensors that gates were multiplied into.
Watching = Callable[[Iterable[Tensor]], Watch]
