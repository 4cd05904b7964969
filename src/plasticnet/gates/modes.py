"""Lets a mode act while a module runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def within(module: nn.Module, make: Callable[[], TorchFunctionMode]) -> Iterator[None]:
    """Let a new mode act in each call of a module within this context.

    Args:
        module: The module.
        make: Makes the mode.
    """
    modes: list[TorchFunctionMode] = []

    def enter(*_: Any) -> None:
        modes.append(make())
        modes[-1].__enter__()

    def leave(*_: Any) -> None:
        while modes:
            modes.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        leave()  # because an interrupt skips the hooks
