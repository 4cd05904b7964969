"""Lets gates act on weights that FSDP2 gathers only while a part of the model runs.

``fully_shard`` leaves every process a part of each parameter. Before the forward of a module that it was called with it
gathers the parameters, and afterwards it frees them. So the gates are multiplied into them in between: by a hook that
runs after its hook before the forward, and by one that runs before its hook after the forward. In the backward pass the
product is then differentiated before FSDP2 takes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.tools.fsdp_private import sharded_parameters
from plasticnet.tools.sharding import is_sharded
from plasticnet.tools.torch_private import parameters_of

# Modules, and what is gathered before their forward: by name, a module that holds it, and its name there.
Later = list[tuple[tuple[nn.Module, ...], dict[str, tuple[nn.Module, str]]]]
Held = Callable[[set[str], bool], AbstractContextManager[None]]


def gathered_later(model: nn.Module, places: Mapping[str, list[tuple[nn.Module, str]]]) -> Later:
    """Return which of some parameters are gathered only when a module within the model runs.

    Those that are gathered when the model is called, or by a module around it, are not among them.

    Args:
        model: The model.
        places: For each name of a parameter, the modules that hold it and its name there.
    """
    found = sharded_parameters(model)
    if not found:
        return []
    inside = {id(m) for m in model.modules()}
    modules = {
        (id(m), name): p.modules for p in found if all(id(m) in inside for m in p.modules) for m, name in p.places
    }
    by_modules: dict[tuple[nn.Module, ...], dict[str, tuple[nn.Module, str]]] = {}
    for name, ((holder, leaf), *_) in places.items():
        if (id(holder), leaf) in modules:
            by_modules.setdefault(modules[id(holder), leaf], {})[name] = holder, leaf
    return list(by_modules.items())


@contextmanager
def folding_later(later: Later, held: Held, now: bool) -> Iterator[None]:
    """Let modules hold other tensors in the place of parameters whenever these are gathered within this context.

    Args:
        later: The modules, and what is gathered before their forward.
        held: Returns a context in which modules hold other tensors in the place of the parameters of these names, and
            takes whether they did so before, in what runs again.
        now: Whether to do so once again, at once, where parameters are gathered already.
    """
    open_ones: dict[nn.Module, ExitStack] = {}

    def before(names: set[str], module: nn.Module, _: Any) -> None:
        open_ones[module] = stack = ExitStack()
        stack.enter_context(held(names, False))

    def after(module: nn.Module, *_: Any) -> None:
        if (stack := open_ones.pop(module, None)) is not None:
            stack.close()

    with ExitStack() as stack:
        for modules, places in later:
            if now and not any(is_sharded(parameters_of(holder)[leaf]) for holder, leaf in places.values()):
                stack.enter_context(held(set(places), True))
            for module in modules:
                stack.callback(module.register_forward_pre_hook(partial(before, set(places))).remove)
                stack.callback(module.register_forward_hook(after, prepend=True, always_call=True).remove)
        try:
            yield
        finally:
            for module in list(open_ones)[::-1]:
                after(module)


def values_of(
    multiplied: Callable[[], dict[str, Tensor]], parameters: Mapping[str, Tensor], gates: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return products whose graph exists already, as tensors that require gradients like these.

    A checkpoint that runs a part of the model again compares what it keeps of both runs. The part was given the
    products, and has not computed them, so that nothing of that may count.

    Args:
        multiplied: Computes the products, by name.
        parameters: The parameters that are multiplied, by name.
        gates: The gates that they are multiplied by.
    """
    with torch.no_grad():
        found = multiplied()
    trained = any(g.requires_grad for g in gates)
    return {n: t.detach().requires_grad_(trained or parameters[n].requires_grad) for n, t in found.items()}
