"""Records what a call computes before its first gate, and hands it out again in later passes.

`Recorder` and `Player` are modes that see every torch function of one call of the network. They share a `Prefix`.
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
    """Follows the functions of one call until the first gate acts.

    Args:
        prefix: The record.
        gated: The tensors that gates were multiplied into.
    """

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
        """Note that the first gate acts."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Note that the next part of the model will run again in the backward pass.

        None of its results can be recorded or handed out: what gradient checkpointing keeps of the first run must be
        all that it keeps of the second one.
        """
        raise NotImplementedError

    def output(self, output: Any) -> Any:
        """Take what the network returns, and return it."""
        return output


class Recorder(_Following):
    """Records what runs within it until the first gate acts; up to there it runs with gradients.

    The first gate acts when `end` is called, or when a function reads one of the ``gated`` tensors.

    Args:
        prefix: The record to fill.
        gated: The tensors that gates were multiplied into.
    """

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
        """Note that the first gate acts."""
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
        """Return whether a tensor was recorded and its graph can be handed on.

        Within an autograd function the graph cannot be handed on, because the function runs without gradients.
        """
        own = id(t) in self.prefix.made or id(t) in self.prefix.known
        return own and (torch.is_grad_enabled() or not t.requires_grad)

    def interrupt(self) -> None:
        """Note that the next part of the model will run again in the backward pass: stop recording."""
        if self.running:
            self._give_up()

    def _give_up(self) -> None:
        """Stop recording, and forget what was recorded."""
        self.running = False
        torch.set_grad_enabled(self.gradients)
        self.prefix.forget()


class Player(_Following):
    """Hands the recorded results to what runs within it.

    Args:
        prefix: The record.
        gated: The tensors that gates were multiplied into.
        last: Whether this is the last pass, after which the results are released.

    Raises:
        Diverged: Something other than the recorded functions is called, or a result without content is read.
    """

    def __init__(self, prefix: Prefix, gated: Iterable[Tensor], last: bool) -> None:
        super().__init__(prefix, gated)
        self.at, self.last = 0, last

    def _check(self, read: Iterable[Tensor]) -> None:
        """Raise `Diverged` if one of these tensors has no content because it was dropped."""
        if self.prefix.dropped and any(t.is_meta for t in read):
            raise Diverged

    def output(self, output: Any) -> Any:
        """Take what the network returns, check that it has content, and return it."""
        self._check(tensors_within(output))
        return output

    def interrupt(self) -> None:
        """Note that the next part of the model will run again: raise `Diverged` unless all results were handed out."""
        self.end()

    def end(self, *_: Any) -> None:
        """Note that the first gate acts; raise `Diverged` unless all results were handed out."""
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
        # A function without tensors runs again: it may be the switch of ``torch.no_grad``, whose context may end after
        # the first gate.
        return func(*args, **kwargs) if not ids and not tensors_within(result) else result
