"""Notes the operations of a run, which tell whether a model computes something in one of its two modes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from plasticnet.tools.torch_private import schema_name

_COUNTER = "num_batches_tracked"  # the buffer in which a BatchNorm counts the batches of its training
_FEW = 8  # the largest constant whose entries are noted
_DROPOUT = frozenset({"native_dropout", "empty", "empty_like", "new_empty"})  # these leave nothing beside the noise
_SCALING = frozenset({"div", "div_"})
_MULTIPLYING = frozenset({"mul", "mul_"})


class Operations:
    """The operations of one run, each with the numbers that it was given, however often and in whatever order they ran.

    What dropout, stochastic depth and BatchNorm do in training mode does not count: they have no number of their own
    that follows a width.
    """

    def __init__(self) -> None:
        self._found: Counter[tuple[Any, ...]] = Counter()
        self._noise: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # masks of dropout, with the share that stays

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> None:
        """Note an operation.

        Args:
            func: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            name: The name of its first argument, if that is a parameter or a buffer.
        """
        kind = schema_name(func).removeprefix("aten::")
        if "batch_norm" in kind:
            self._found["batch_norm",] += 1
        elif not self._is_dropout(kind, args) and not (name or "").endswith(_COUNTER):
            numbers = _numbers((*args, *kwargs.values()))
            if kind == "lift_fresh" and args[0].numel() <= _FEW and not args[0].is_meta:
                numbers += args[0].flatten().tolist()
            self._found[kind, *numbers] += 1

    def _is_dropout(self, kind: str, args: Sequence[Any]) -> bool:
        """Return whether an operation draws a mask of zeros and ones, divides it by its mean, or multiplies by it."""
        if kind == "bernoulli_" and (len(args) == 1 or isinstance(args[1], float)):
            self._noise[args[0]] = args[1] if len(args) > 1 else 0.5
            return True
        if kind in _SCALING and isinstance(args[0], Tensor):
            return args[0] in self._noise and args[1] == self._noise[args[0]]
        if kind in _MULTIPLYING:
            return any(isinstance(a, Tensor) and a in self._noise for a in args)
        return kind in _DROPOUT

    def same_as(self, other: Operations, numbers: bool = True) -> bool:
        """Return whether another run had the same operations.

        Args:
            other: The operations of the other run.
            numbers: Whether the numbers must be the same, too, which they are not if the runs had other batch sizes.
        """
        return self._found == other._found if numbers else self._kinds() == other._kinds()

    def _kinds(self) -> Counter[str]:
        """Return how often each operation ran, whatever numbers it was given."""
        kinds: Counter[str] = Counter()
        for (kind, *_), count in self._found.items():
            kinds[kind] += count
        return kinds


def _numbers(arguments: Sequence[Any]) -> list[int | float]:
    """Return the numbers among the arguments of an operation, also those in a list, such as the sizes of a view."""
    found: list[int | float] = []
    for a in arguments:
        if isinstance(a, int | float):
            found.append(a)
        elif isinstance(a, list | tuple):
            found += [n for n in a if isinstance(n, int | float)]
    return found
