"""What a network computes before its first gate is the same in all passes of a step: computed once.

The partner pass runs first and without gradients, but for what comes before the first gate: there it
records what every torch function returned, with the graph for the backward pass. The training pass is
handed these results. Where something cannot be followed (a tensor that no recorded function made, a
result that can be changed), nothing is taken over. This order keeps no graph but the prefix's while
the partner runs; of the results only those are kept that something behind the first gate can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.tools.snapshot import Snapshot
from plasticnet.tools.torch_private import is_transformed, version
from plasticnet.tools.trees import tensors_within

# References to a result that is not held elsewhere: of its step, of `made`, of a variable, and of the call that counts.
# Were it not so in some Python, results would be kept, or the pass would diverge.
_OWN = 4
_TORCH = torch.dtype | torch.device | torch.layout | torch.memory_format  # constants of torch, which never change


class Diverged(BaseException):  # not an Exception: a closure may catch these
    """The pass does not call the functions that were recorded."""


@dataclass
class Prefix:
    """The functions that a call of the network ran before the first gate, and what they returned.

    ``known`` are the model's parameters and buffers by identity, which a recorded function may read
    beside ``inputs``.
    """

    model: nn.Module
    known: Mapping[int, Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    keep: bool = False  # all results, also those that nothing seems to hold
    steps: list[tuple[Any, list[int], Any]] = field(default_factory=list)  # function, the tensors it read, its result
    made: dict[int, Tensor] = field(default_factory=dict)  # inputs, and results
    versions: dict[int, int] = field(default_factory=dict)  # of `made`, at the end
    state: Snapshot | None = None  # random numbers and buffers at the end
    dropped: bool = False  # whether some results have no content

    def replays(self, inputs: Any, last: bool = True) -> bool:
        """Whether a pass with these inputs can be handed the recorded results: something was recorded, the
        inputs are the same tensors, nothing was changed in place since, and gradients are wanted if it is the
        last pass. If not, the results are forgotten."""
        same = [id(t) for t in tensors_within(inputs)] == [id(t) for t in self.inputs]
        unchanged = all(version_of(t) == self.versions.get(i) for i, t in self.made.items())
        if bool(self.steps) and same and unchanged and (torch.is_grad_enabled() or not last):
            return True
        self.forget()
        return False

    def forget(self) -> None:
        """Let go of the results."""
        self.steps.clear()
        self.made.clear()

    def drop(self) -> None:
        """Put tensors without content in the place of results that only this record holds: functions that were
        recorded are not run on them again. If something else does run on one, the pass diverges."""
        ids: dict[int, int] = {}
        for at, (func, read, result) in enumerate(self.steps):
            read = [ids.get(i, i) for i in read]
            if isinstance(result, Tensor) and id(result) in self.made and getrefcount(result) <= _OWN:
                empty = torch.empty_like(result, device="meta", requires_grad=False)
                del self.made[id(result)]
                self.made[id(empty)] = empty
                ids[id(result)] = id(empty)
                result = empty
            self.steps[at] = (func, read, result)
        self.dropped = bool(ids)


def read_tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a function reads."""
    flat = not kwargs and not any(isinstance(a, list | tuple | dict) for a in args)
    return [a for a in args if isinstance(a, Tensor)] if flat else tensors_within((args, kwargs))


def is_fixed(result: Any) -> bool:
    """Whether a result can be handed out twice: nothing that could be changed without notice, and of tensors
    those that stand for themselves: no subclass, and none that lives within a transformation."""
    if isinstance(result, Tensor):
        return type(result) in (Tensor, nn.Parameter) and not is_transformed(result)
    if isinstance(result, tuple):
        return all(is_fixed(r) for r in result)
    return result is None or isinstance(result, bool | int | float | complex | str | _TORCH)


def version_of(t: Tensor) -> int:
    """How often a tensor was changed in place; 0 for those of inference mode, which do not count it."""
    return 0 if t.is_inference() else version(t)
