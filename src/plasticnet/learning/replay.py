"""Recording what a call computes before its first gate, and handing it out again.

Both are modes that see every torch function of one call of the network; see `Prefix` for what they share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from plasticnet.learning.prefix import Diverged, Prefix, is_fixed, read_tensors, version_of
from plasticnet.tools.snapshot import Snapshot
from plasticnet.tools.trees import tensors_within


class _Following(TorchFunctionMode):
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


class Recorder(_Following):
    """Records what runs in it until its `end`, or a function that reads one of the ``gated`` tensors; until then with
    gradients."""

    def __init__(self, prefix: Prefix, gated: Iterable[Tensor]) -> None:
        super().__init__(prefix, gated)
        prefix.made.update((id(t), t) for t in prefix.inputs)
        self.running = all(is_fixed(t) for t in prefix.inputs)
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
                self.prefix.versions = {i: version_of(t) for i, t in self.prefix.made.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = read_tensors(args, kwargs) if self.running else []
        if self.running:
            if any(id(t) in self.gated for t in read):
                self.end()
            elif any(not self._follows(t) for t in read):
                self._give_up()
        result = func(*args, **kwargs)
        if self.running:
            if not is_fixed(result):
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


class Player(_Following):
    """Hands the recorded results to what runs in it, and in the ``last`` pass lets go of them. Raises `Diverged` when
    something else is called."""

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
            self._check(read_tensors(args, kwargs))
            return func(*args, **kwargs)
        recorded, ids, result = self.prefix.steps[self.at]
        if func != recorded or [id(t) for t in read_tensors(args, kwargs)] != ids:
            raise Diverged
        self.at += 1
        # Such as the switch of ``torch.no_grad``, which may end behind the first gate.
        return func(*args, **kwargs) if not ids and not tensors_within(result) else result
