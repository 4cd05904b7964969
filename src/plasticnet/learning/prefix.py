"""Keeps what a network computes before its first gate: this prefix is the same in all passes of a step.

The partner pass runs first. Up to the first gate it runs with gradients, and records what every torch function
returned, together with the graph for the backward pass. The rest of it runs without gradients. The training pass is
handed the recorded results. Where something cannot be followed (a tensor that no recorded function has made, or a
result that can be changed without notice), nothing is handed over.

In this order the graph of the prefix is the only one that is kept while the partner runs. Of the recorded results only
those are kept that something after the first gate can read.
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

# The number of references to a result that only the record holds: from its step, from `made`, from a variable, and from
# the call that counts them. In a Python where this number is wrong, results are kept, or the pass diverges.
_OWN = 4
_TORCH = torch.dtype | torch.device | torch.layout | torch.memory_format  # constants of torch, which never change


class Diverged(BaseException):  # not an Exception, because a closure may catch those
    """Says that a pass does not call the functions that were recorded."""


@dataclass
class Prefix:
    """The functions that a call of the network ran before the first gate, and what they returned.

    Attributes:
        model: The model.
        known: Its parameters and buffers by ``id``, which a recorded function may read.
        inputs: The tensors that the network was called with, which a recorded function may read, too.
        keep: Whether all results are kept, also those that nothing seems to hold.
        steps: For each function that ran: the function, the ``id`` of every tensor that it read, and its result.
        made: The inputs and the results by ``id``.
        versions: How often each tensor in ``made`` had been changed in place when the first gate acted.
        state: Random numbers and buffers when the first gate acted.
        dropped: Whether some results were replaced by tensors without content.
    """

    model: nn.Module
    known: Mapping[int, Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    keep: bool = False
    steps: list[tuple[Any, list[int], Any]] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    state: Snapshot | None = None
    dropped: bool = False

    def replays(self, inputs: Any, last: bool = True) -> bool:
        """Return whether a pass with these inputs can be handed the recorded results; if not, forget them.

        It can if something was recorded, the inputs are the same tensors, none of the tensors was changed in place
        since, and the last pass of the step runs with gradients.

        Args:
            inputs: What the network is called with, in any containers.
            last: Whether this is the last pass of the step.
        """
        same = [id(t) for t in tensors_within(inputs)] == [id(t) for t in self.inputs]
        unchanged = all(version_of(t) == self.versions.get(i) for i, t in self.made.items())
        if bool(self.steps) and same and unchanged and (torch.is_grad_enabled() or not last):
            return True
        self.forget()
        return False

    def forget(self) -> None:
        """Release all results."""
        self.steps.clear()
        self.made.clear()

    def drop(self) -> None:
        """Replace results that only this record holds by tensors without content, on the meta device.

        The recorded functions are not run again, so they do not need these results. If anything else reads one, the
        pass diverges.
        """
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
    """Return the tensors among the arguments of a function."""
    flat = not kwargs and not any(isinstance(a, list | tuple | dict) for a in args)
    return [a for a in args if isinstance(a, Tensor)] if flat else tensors_within((args, kwargs))


def is_fixed(result: Any) -> bool:
    """Return whether a result can be handed out a second time.

    It must not contain anything that could be changed without notice, such as a list. A tensor must be a plain one,
    and neither of a subclass nor within a transformation of ``torch.func``.
    """
    if isinstance(result, Tensor):
        return type(result) in (Tensor, nn.Parameter) and not is_transformed(result)
    if isinstance(result, tuple):
        return all(is_fixed(r) for r in result)
    return result is None or isinstance(result, bool | int | float | complex | str | _TORCH)


def version_of(t: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 for tensors of inference mode, which do not count it."""
    return 0 if t.is_inference() else version(t)
