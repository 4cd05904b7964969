"""Runs a model compiled while gates act by hooks.

What ``model.compile()`` makes is no place for hooks that come and go: the compiler does not ask whether a module that
had none has some now, and what it has once compiled would go on without them. So a model with hooks is compiled within
a function of its own, which runs for nothing else. Everything must become one graph. If there were several, the code
of modules in between would be compiled by itself, and be found again by other networks of the same class.

The multipliers of hooks become inputs of the graph. The compiler compares their shapes and dtypes only, so that what
was drawn, k and the epoch change nothing; and it compares how many hooks there are. It takes the shapes of what hooks
hold for fixed, so that each size of a batch is compiled for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

from plasticnet.errors import first_line
from plasticnet.tools.torch_private import cannot_be_compiled


class NotOneGraph(Exception):
    """Says why the compiler cannot make one graph of a model."""


class HookedCalls:
    """Calls a model that has hooks, compiled.

    Args:
        options: The keyword arguments of `torch.compile`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = {**options, "fullgraph": True}
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the model returns.

        Args:
            model: The model, whose hooks are in place.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            NotOneGraph: The compiler cannot make one graph of it. Nothing has run then.
        """
        if self._compiled is None:
            # The compiler counts recompilations by code, so that each network needs a code object of its own.
            own = FunctionType(_call.__code__.replace(), _call.__globals__, "call_with_hooks")
            self._compiled = cast(Callable[..., Any], torch.compile(own, **self._options))
        try:
            return self._compiled(model, args, dict(kwargs))
        except Exception as error:
            if not cannot_be_compiled(error):
                raise
            raise NotOneGraph(first_line(error)) from error


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def compiling_seconds(model: nn.Module) -> float:
    """Return roughly how many seconds it takes to compile a model, from its number of layers.

    The rest is for what every compilation begins with. It is a guess for the default compiler on a CPU, where each
    layer comes to about one kernel for the forward and one for the backward pass.
    """
    return 10.0 + sum(not any(m.children()) for m in model.modules())
