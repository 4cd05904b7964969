"""Says what the state dict of a schedule holds, and restores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plasticnet.cost.latency import Latency
from plasticnet.errors import PlasticError
from plasticnet.growing.rule import GrowthRule
from plasticnet.net import PlasticNet
from plasticnet.training.force import Force

# What the sampler has found out about the closure. Asked again, another batch might answer otherwise or not at all, and
# a training that goes on would draw other random numbers.
_FOUND = ("samples_apart", "rows_apart")
# What a schedule may have or lack, and what has a state of its own.
_PARTS = ("growth", "pressure", "budget")


def state_of(net: PlasticNet, growth: GrowthRule | None, force: Force) -> dict[str, Any]:
    """Return the measured latency, what is known of the closure, and the states of growth, pressure and budget.

    Within an epoch there is also the last gradient of the loss with respect to the gates, by which a budget measures
    its pressure in the next step.

    Args:
        net: The network.
        growth: How it grows, or None.
        force: What presses on its gates.
    """
    parts = {name: part.state_dict() for name, part in _parts(growth, force).items()}
    latency = None if net.latency is None else net.latency.as_dict()
    found = {name: getattr(net.sampler, name) for name in _FOUND}
    gradient = net.sampler.gradient
    gradient = None if gradient is None else gradient.detach().clone()
    return {"latency": latency, "found": found, "gradient": gradient, **dict.fromkeys(_PARTS), **parts}


def restore(state: Mapping[str, Any], net: PlasticNet, growth: GrowthRule | None, force: Force) -> None:
    """Restore what `state_of` returned.

    Args:
        state: The state.
        net: The network.
        growth: How it grows, or None.
        force: What presses on its gates.

    Raises:
        PlasticError: The state is that of a schedule with other parts, or one of them does not fit. Parts that come
            before that one were changed.
    """
    parts = _parts(growth, force)
    then, now = [n for n in _PARTS if state.get(n) is not None], [n for n in _PARTS if n in parts]
    if then != now:
        raise PlasticError(
            f"the state is that of a schedule with {_words(then)}, and this one has {_words(now)}: give the Schedule "
            f"the same of {', '.join(f'{n}=' for n in _PARTS)}"
        )
    found = {name: _answer(state.get("found"), name) for name in _FOUND}
    latency = None if state.get("latency") is None else Latency.from_dict(state["latency"])
    gradient = state.get("gradient")
    if gradient is not None and not (isinstance(gradient, Tensor) and gradient.is_floating_point()):
        raise PlasticError(f"the state holds a gradient of the gates that is none: {gradient!r}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    if latency is not None:
        net.use_latency(latency)
    for name, answer in found.items():
        setattr(net.sampler, name, answer)
    net.sampler.gradient = None if gradient is None else gradient.to(net.like.device)


def _answer(found: Any, name: str) -> bool | None:
    """Return what a state says that the sampler has found out, or None where it says nothing."""
    answer = found.get(name) if isinstance(found, Mapping) else found
    if answer is not None and type(answer) is not bool:
        raise PlasticError(f"the state says of {name} neither yes nor no, but {answer!r}")
    return answer


def _parts(growth: GrowthRule | None, force: Force) -> dict[str, GrowthRule | Force]:
    """Return what has a state of its own, by its name in the state of the schedule."""
    parts = {"growth": growth, force.kind: force}
    return {name: part for name, part in parts.items() if name is not None and part is not None}


def _words(names: list[str]) -> str:
    """Return the names of parts as a part of a sentence."""
    words = {"growth": "growth", "pressure": "a pressure", "budget": "a budget"}
    return " and ".join(words[n] for n in names) or "none of these"
