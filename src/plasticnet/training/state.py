"""Says what the state dict of a schedule holds, and restores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plasticnet.cost.latency import Latency
from plasticnet.errors import PlasticError
from plasticnet.growing.rule import GrowthRule
from plasticnet.net import PlasticNet
from plasticnet.training.force import Force

# What a schedule may have or lack, and what has a state of its own.
_PARTS = ("growth", "pressure", "budget")


def state_of(net: PlasticNet, growth: GrowthRule | None, force: Force) -> dict[str, Any]:
    """Return the measured latency, the state of growth, and that of the pressure or of the budget.

    Args:
        net: The network.
        growth: How it grows, or None.
        force: What presses on its gates.
    """
    parts = {name: part.state_dict() for name, part in _parts(growth, force).items()}
    latency = None if net.latency is None else net.latency.as_dict()
    return {"latency": latency, **dict.fromkeys(_PARTS), **parts}


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
    latency = None if state.get("latency") is None else Latency.from_dict(state["latency"])
    for name, part in parts.items():
        part.load_state_dict(state[name])
    if latency is not None:
        net.use_latency(latency)


def _parts(growth: GrowthRule | None, force: Force) -> dict[str, GrowthRule | Force]:
    """Return what has a state of its own, by its name in the state of the schedule."""
    parts = {"growth": growth, force.kind: force}
    return {name: part for name, part in parts.items() if name is not None and part is not None}


def _words(names: list[str]) -> str:
    """Return the names of parts as a part of a sentence."""
    words = {"growth": "growth", "pressure": "a pressure", "budget": "a budget"}
    return " and ".join(words[n] for n in names) or "none of these"
