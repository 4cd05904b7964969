"""Finds how a block can begin as the identity: the layers whose weights of zero make it return its first input.

It tries, and goes by no names: a copy of the block with random parameters runs on what the block gets in a run of the
model, with some layers set to zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.tools.copying import deep_copy
from plasticnet.tools.drawn import random_parameter
from plasticnet.tools.gradients import without_gradients
from plasticnet.tools.inputs import Call
from plasticnet.tools.snapshot import duplicate
from plasticnet.tools.torch_private import parameters_of
from plasticnet.units import family_of

# The arguments of one call of a block.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# A block has at most so many branches, one after the other, such as the attention and the MLP of a transformer.
_BRANCHES = 2


def branch_ends(model: nn.Module, names: Sequence[str], calls: Sequence[Call]) -> dict[str, tuple[str, ...] | None]:
    """Return for each block the names of the modules at the ends of its branches, or None.

    Where the weight and the bias of these modules are zero, the block returns exactly its first input on the example
    inputs, in evaluation and in training mode, and a gradient reaches each of these weights. They are as few as
    possible, one for each branch, and the last ones that do. A block for which there are none cannot begin as the
    identity, and has None.

    Args:
        model: The model, which is left as it was but for random numbers.
        names: The names of the blocks.
        calls: The calls of the model in evaluation mode, of which the first one must succeed.
    """
    if not names or any(p.is_meta for p in model.parameters()):
        return dict.fromkeys(names)
    noted = _noted(model, names, calls)
    found: dict[str, tuple[str, ...] | None] = {}
    known: dict[str, tuple[str, ...]] = {}  # of each family what was found last, which is tried first
    for name in names:
        family, ends = family_of(name), None
        with suppress(Exception):  # A block that does not run by itself cannot be tried.
            block = duplicate(model.get_submodule(name), random_parameter)
            ends = _ends(block, noted[name], known.get(family, ()))
        if ends is not None:
            known[family] = ends
        found[name] = None if ends is None else tuple(f"{name}.{end}".rstrip(".") for end in ends)
    return found


def _noted(model: nn.Module, names: Sequence[str], calls: Sequence[Call]) -> dict[str, list[_Arguments]]:
    """Return what each block gets in runs of the model, of which all but the first may fail."""
    noted: dict[str, list[_Arguments]] = {name: [] for name in names}
    twin = duplicate(model).eval()
    for name in names:
        hook = _keep(noted[name])
        twin.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    for i, call in enumerate(calls):
        with without_gradients(), suppress(*[Exception] if i else []):
            args, kwargs = deep_copy((call.args, call.kwargs))
            twin(*args, **kwargs)
    return noted


def _keep(noted: list[_Arguments]) -> Any:
    """Return a hook that keeps copies of the arguments of a module."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted.append(deep_copy((args, kwargs)))

    return hook


def _ends(block: nn.Module, noted: Sequence[_Arguments], known: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names within a block of the modules at the ends of its branches, or None.

    Args:
        block: A copy of the block with random parameters.
        noted: What the block gets.
        known: The names that are tried first.
    """
    modes = [training for training in (False, True) if _runs(block, noted, training)]
    if not noted or not modes:
        return None
    names = {module: name for name, module in block.named_modules()}
    last_first = _executed(block, noted[0])[::-1]
    first = [module for module in last_first if names[module] in known]
    for some in _subsets(first, last_first):
        if _is_identity(block, some, noted, modes):
            return tuple(names[module] for module in some)
    return None


def _subsets(first: list[nn.Module], modules: list[nn.Module]) -> Iterator[tuple[nn.Module, ...]]:
    """Yield some modules together, and then all subsets of others, from the smallest ones on."""
    if first:
        yield tuple(first)
    for n in range(1, _BRANCHES + 1):
        yield from combinations(modules, n)


def _runs(block: nn.Module, noted: Sequence[_Arguments], training: bool) -> bool:
    """Return whether a block runs by itself in a mode; norms over a batch of one do not in training."""
    try:
        with without_gradients():
            for arguments in noted:
                _run(block, arguments, training)
    except Exception:
        return False
    return True


def _run(block: nn.Module, arguments: _Arguments, training: bool) -> Any:
    """Run a block on copies of what it gets, since it may change that in place."""
    args, kwargs = deep_copy(arguments)
    return block.train(training)(*args, **kwargs)


def _executed(block: nn.Module, arguments: _Arguments) -> list[nn.Module]:
    """Return the modules with a weight that trains, in the order in which they are done.

    A module whose weight another one reads, as attention reads that of its projection, is done with that one.
    """
    found: list[nn.Module] = []

    def hook(module: nn.Module, *_: Any) -> None:
        found.extend(m for m in module.modules() if m not in found and _weight(m) is not None)

    handles = [module.register_forward_hook(hook) for module in block.modules()]
    try:
        with without_gradients():
            _run(block, arguments, False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _weight(module: nn.Module) -> nn.Parameter | None:
    """Return the weight of a module if it trains, or None."""
    weight = parameters_of(module).get("weight")
    return weight if weight is not None and weight.requires_grad else None


def _is_identity(
    block: nn.Module, some: Sequence[nn.Module], noted: Sequence[_Arguments], modes: Sequence[bool]
) -> bool:
    """Return whether a block is the identity where these modules are zero, and can leave it by their gradients.

    Args:
        block: The block.
        some: The modules.
        noted: What the block gets.
        modes: Whether it is tried in training mode, for each mode in which it is tried.
    """
    before = [(p, p.detach().clone()) for m in some for p in ends_of(m)]
    try:
        with without_gradients():
            for p, _ in before:
                p.detach().zero_()
            for training in modes:
                for arguments in noted:
                    out, first = _run(block, arguments, training), _first(arguments)
                    if not (isinstance(out, Tensor) and out.shape == first.shape and torch.equal(out, first)):
                        return False
        return _learns(block, some, noted[0], modes[-1])
    finally:
        for p, values in before:
            p.detach().copy_(values)


def _learns(block: nn.Module, some: Sequence[nn.Module], arguments: _Arguments, training: bool) -> bool:
    """Return whether a gradient reaches the weights of these modules."""
    weights = [w for m in some if (w := _weight(m)) is not None]
    with torch.enable_grad():
        out = _run(block, arguments, training)
        gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), weights, allow_unused=True)
    return all(g is not None and bool(g.any()) for g in gradients)


def _first(arguments: _Arguments) -> Tensor:
    """Return the first input of a block."""
    args, kwargs = arguments
    return args[0] if args else next(iter(kwargs.values()))


def ends_of(module: nn.Module) -> list[nn.Parameter]:
    """Return the weight and the bias of a module, which are zero where a block begins as the identity."""
    own = parameters_of(module)
    return [p for name in ("weight", "bias") if (p := own.get(name)) is not None]
