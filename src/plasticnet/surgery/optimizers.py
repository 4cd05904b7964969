"""Optimizers: which of them can follow a change of size, and how their state follows.

A resize slices the state of an optimizer as it slices the parameters. This is right where the state has one number for
each entry of the parameter, as in torch's Adam and its relatives. Other optimizers are refused by name before anything
has changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from plasticnet.errors import PlasticError
from plasticnet.tools.sharding import is_sharded

Optimizers = Optimizer | Sequence[Optimizer] | None  # one, all of those that hold the parameters, or none

# The new entries of such state start at the mean of the kept ones. At 0, a running mean of squares would make the first
# steps up to 6.5 times too long, and a step size of 0 would make none.
_MEANS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "step_size"}

# These patterns are sought in the full name of a class and of its base classes. Each has the reason for a refusal.
_REFUSED = {
    r"^(bitsandbytes|torchao)\.|(4bit|8bit|Fp8)$": "its state is quantised in blocks, which cannot be sliced",
    r"^schedulefree\.|ScheduleFree": "the weights it trains are interpolations with others that it keeps",
    r"(?i)shampoo|\.soap$": "it keeps preconditioners for whole dimensions, and bases in which they are diagonal",
    r"(?i)adafactor": "its second moments are factored over whole rows and columns",
    r"(?i)\.\w*lbfgs$": "its state is a history of all parameters in one vector",
    r"\.SparseAdam$": "it takes sparse gradients only, which no gated layer has",
    r"\.(A|E|F|G|W|Look)?SAM$": "it runs the model twice a step, at weights that it moves in between",
    r"(?i)\.lookahead$": "it keeps a second, slow copy of the weights",
    r"\.ZeroRedundancyOptimizer$": "every rank keeps a part of the state only",
}

_INSTEAD = "Use SGD, Adam, AdamW or another optimizer whose state has its parameter's shape"


def listed(optimizer: Any) -> list[Optimizer]:
    """Return one optimizer, several or none as a list.

    Raises:
        PlasticError: Something else was given.
    """
    found = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    found = [] if found is None else list(found) if isinstance(found, Sequence) else [found]
    for o in found:
        if not isinstance(o, Optimizer):
            raise PlasticError(f"{_name(o)} is no torch.optim.Optimizer; pass the optimizer, or a list of all of them")
    return found


def check_optimizers(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that optimizers can follow a change of size; an empty list always can.

    Args:
        optimizers: The optimizers.
        parameters: All parameters of the network, by name.

    Raises:
        PlasticError: The optimizers do not hold every trainable parameter, are of a kind that cannot be resized, or
            have state that cannot be sliced.
    """
    for optimizer in optimizers:
        _check_kind(optimizer)
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    missing = [n for n, p in parameters.items() if p.requires_grad and id(p) not in held]
    if optimizers and any(is_sharded(parameters[n]) for n in missing):
        raise PlasticError(
            f"the optimizers do not hold the DTensors that fully_shard has made of {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; build them after fully_shard, from net.param_groups()"
        )
    if optimizers and missing:
        raise PlasticError(
            f"the optimizers do not hold {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; "
            "build them from net.param_groups(), and pass all of them"
        )
    names = {id(p): n for n, p in parameters.items()}
    for optimizer in optimizers:
        for p, key, value in _state(optimizer):
            what = _unsliceable(p, value)
            if what:
                shape = f" of shape {tuple(p.shape)}" if isinstance(p, Tensor) else ""
                raise PlasticError(
                    f"{_name(optimizer)} keeps state {key!r} {what} for {names.get(id(p), 'a parameter')}{shape}; "
                    f"it cannot be resized. {_INSTEAD}."
                )


def rebind(
    optimizer: Optimizer,
    moved: Mapping[nn.Parameter, nn.Parameter],
    rewrite: Callable[[nn.Parameter, Tensor, bool], Tensor],
) -> None:
    """Put new parameters in the place of old ones, and carry over their state.

    Args:
        optimizer: The optimizer.
        moved: The new parameter for each old one.
        rewrite: A function ``rewrite(old, value, mean)`` that brings state of an old parameter to the new shape. New
            entries are 0, or with ``mean`` the mean of the kept entries.
    """
    for group in optimizer.param_groups:
        group["params"] = [moved.get(p, p) for p in group["params"]]
    for old in [p for p in moved if p in optimizer.state]:
        state = optimizer.state.pop(old)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                state[key] = rewrite(old, value, key in _MEANS)
        optimizer.state[moved[old]] = state


def forget(optimizers: Sequence[Optimizer], parameter: nn.Parameter, entries: Tensor) -> None:
    """Let optimizers forget the direction of some entries.

    State such as a running mean of gradients is set to 0. What optimizers remember about the size of gradients stays.

    Args:
        optimizers: The optimizers.
        parameter: The parameter.
        entries: The entries, as a mask or as indices.
    """
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and key not in _MEANS:
                value[entries] = 0


def _name(thing: object) -> str:
    """Return the name of an object's class."""
    return type(thing).__qualname__


def _check_kind(optimizer: Optimizer) -> None:
    """Refuse optimizers that are known not to work, and wrappers of optimizers, whatever state they have so far.

    Raises:
        PlasticError: The optimizer is refused; the message says why, and what to use instead.
    """
    for kind in type(optimizer).__mro__:
        for pattern, reason in _REFUSED.items():
            if re.search(pattern, f"{kind.__module__}.{kind.__name__}"):
                raise PlasticError(f"{_name(optimizer)} cannot follow a change of size: {reason}. {_INSTEAD}.")
    for attribute, value in vars(optimizer).items():
        inner = [o for o in tree_leaves(value) if isinstance(o, Optimizer) and o is not optimizer]
        if inner:
            shared = all(o.state is optimizer.state and o.param_groups is optimizer.param_groups for o in inner)
            way = f"pass that, .{attribute}" if shared else f"it keeps groups or state of its own. {_INSTEAD}"
            raise PlasticError(
                f"{_name(optimizer)} is a wrapper of {_name(inner[0])}, whose change of size it would not see: {way}."
            )


def _state(optimizer: Optimizer) -> Iterator[tuple[Any, str, Any]]:
    """Yield parameter, key and value for everything in the state of an optimizer."""
    for p, state in optimizer.state.items():
        if isinstance(p, Tensor) and isinstance(state, Mapping):
            yield from ((p, key, value) for key, value in state.items())
        else:  # This is state of the optimizer as a whole.
            yield None, str(p), state


def _unsliceable(p: Any, value: Any) -> str:
    """Return what is wrong with an entry of state, or an empty string.

    State is fine if it has one number for each entry of the parameter, or one number for all of them.
    """
    if type(value) in (Tensor, nn.Parameter) or is_sharded(value):
        if value.numel() == 1:
            return ""
        if p is None or value.shape != p.shape:
            return f"of shape {tuple(value.shape)}"
        numbers = value.is_complex() or (value.is_floating_point() and value.dtype.itemsize > 1)
        return "" if numbers or value.dtype == torch.bool else f"of {value.dtype}, quantised,"
    leaves = tree_leaves(value)
    plain = all(leaf is None or isinstance(leaf, Number | str) for leaf in leaves)
    return "" if plain else f"in a {_name(value)}"
