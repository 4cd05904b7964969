"""What a network computes before its first gate is the same in all passes of a step: computed once.

The partner pass runs first and without gradients, but for what comes before the first gate: there it
records what every torch function returned, with the graph for the backward pass. The training pass is
handed these results. Where something cannot be followed (a tensor that no recorded function made, a
result that can be changed), nothing is taken over. This order keeps no graph but the prefix's while
the partner runs; of the results only those are kept that something behind the first gate can read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from plasticnet.snapshot import Snapshot
from plasticnet.trees import tensors_within


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

    def recording(self, gated: Iterable[Tensor]) -> _Recorder:
        """A context that records what runs in it until its ``end``, or a function that reads one of the gated
        tensors; until then with gradients."""
        self.made.update((id(t), t) for t in self.inputs)
        return _Recorder(self, gated)

    def replays(self, inputs: Any, last: bool = True) -> bool:
        """Whether a pass with these inputs can be handed the recorded results: something was recorded, the
        inputs are the same tensors, nothing was changed in place since, and gradients are wanted if it is the
        last pass. If not, the results are forgotten."""
        same = [id(t) for t in tensors_within(inputs)] == [id(t) for t in self.inputs]
        unchanged = all(_version(t) == self.versions.get(i) for i, t in self.made.items())
        if bool(self.steps) and same and unchanged and (torch.is_grad_enabled() or not last):
            return True
        self.forget()
        return False

    def replaying(self, gated: Iterable[Tensor], last: bool = True) -> _Player:
        """A context that hands the recorded results to what runs in it, and in the ``last`` pass lets go of them.
        Raises `Diverged` when something else is called."""
        return _Player(self, gated, last)

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


# References to a result that is not held elsewhere: of its step, of `made`, of a variable, and of the call that counts.
# Were it not so in some Python, results would be kept, or the pass would diverge.
_OWN = 4


class Watch(TorchFunctionMode):
    """Follows the functions of one call until the first gate acts."""

    def __init__(self, prefix: Prefix, gated: Iterable[Tensor]) -> None:
        super().__init__()
        self.prefix = prefix
        self.gated = {id(t) for t in gated}
        self.running = True

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            self.end()

    def end(self, *_: Any) -> None:
        """The first gate acts."""
        raise NotImplementedError

    def output(self, output: Any) -> Any:
        """To be called with what the network returns, which is returned."""
        return output


class _Recorder(Watch):
    def __init__(self, prefix: Prefix, gated: Iterable[Tensor]) -> None:
        super().__init__(prefix, gated)
        self.running = all(_fixed(t) for t in prefix.inputs)
        self.gradients = torch.is_grad_enabled()

    def __enter__(self) -> Any:
        torch.set_grad_enabled(self.gradients or self.running)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_grad_enabled(self.gradients)

    def end(self, *_: Any) -> None:
        """The first gate acts."""
        if self.running:
            self.running = False
            torch.set_grad_enabled(self.gradients)
            if self.prefix.steps:
                self.prefix.state = Snapshot(self.prefix.model)
                if not self.prefix.keep:
                    self.prefix.drop()
                self.prefix.versions = {i: _version(t) for i, t in self.prefix.made.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = _tensors(args, kwargs) if self.running else []
        if self.running:
            if any(id(t) in self.gated for t in read):
                self.end()
            elif any(not self._follows(t) for t in read):
                self._give_up()
        result = func(*args, **kwargs)
        if self.running:
            if not _fixed(result):
                self._give_up()
                return result
            known = self.prefix.known
            self.prefix.made.update((id(t), t) for t in tensors_within(result) if id(t) not in known)
            self.prefix.steps.append((func, [id(t) for t in read], result))
        return result

    def _follows(self, t: Tensor) -> bool:
        """Whether the tensor is one that was recorded, and its graph can be handed on: not so within an autograd
        Function, which runs without gradients."""
        own = id(t) in self.prefix.made or id(t) in self.prefix.known
        return own and (torch.is_grad_enabled() or not t.requires_grad)

    def _give_up(self) -> None:
        self.running = False
        torch.set_grad_enabled(self.gradients)
        self.prefix.forget()


class _Player(Watch):
    def __init__(self, prefix: Prefix, gated: Iterable[Tensor], last: bool) -> None:
        super().__init__(prefix, gated)
        self.at, self.last = 0, last

    def _check(self, read: Iterable[Tensor]) -> None:
        if self.prefix.dropped and any(t.is_meta for t in read):
            raise Diverged

    def output(self, output: Any) -> Any:
        """To be called with what the network returns, which is returned."""
        self._check(tensors_within(output))
        return output

    def end(self, *_: Any) -> None:
        """The first gate acts: everything must have been handed out."""
        if self.running:
            self.running = False
            if self.at < len(self.prefix.steps):
                raise Diverged
            assert self.prefix.state is not None
            self.prefix.state.restore()
            if self.last:
                self.prefix.forget()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.running and self.at == len(self.prefix.steps):
            self.end()
        if not self.running:
            self._check(_tensors(args, kwargs))
            return func(*args, **kwargs)
        recorded, ids, result = self.prefix.steps[self.at]
        if func != recorded or [id(t) for t in _tensors(args, kwargs)] != ids:
            raise Diverged
        self.at += 1
        # Such as the switch of ``torch.no_grad``, which may end behind the first gate.
        return func(*args, **kwargs) if not ids and not tensors_within(result) else result


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a function reads."""
    flat = not kwargs and not any(isinstance(a, list | tuple | dict) for a in args)
    return [a for a in args if isinstance(a, Tensor)] if flat else tensors_within((args, kwargs))


def _fixed(result: Any) -> bool:
    """Whether a result can be handed out twice: nothing that could be changed without notice, and of tensors
    those that stand for themselves: no subclass, and none that lives within a transformation."""
    if isinstance(result, Tensor):
        return type(result) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(result)
    if isinstance(result, tuple):
        return all(_fixed(r) for r in result)
    return result is None or isinstance(result, bool | int | float | complex | str | _TORCH)


_TORCH = torch.dtype | torch.device | torch.layout | torch.memory_format


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
