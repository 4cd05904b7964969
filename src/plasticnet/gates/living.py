"""Knows the networks that live, so that no two of them gate the same parameters.

Every network believes that its sizes are those of its model. If two had gates on one parameter, a resize by one of them
would leave the other with gates that belong to other units.
"""

from __future__ import annotations

import gc
from typing import Protocol
from weakref import WeakSet

from torch import Tensor, nn

from plasticnet.errors import PlasticError


class Network(Protocol):
    """What is asked of a network."""

    model: nn.Module

    def acted_on(self) -> dict[str, Tensor]:
        """Return the parameters that gates act on, or that a resize replaces, by name."""
        ...


_LIVING: WeakSet[Network] = WeakSet()


def register(net: Network) -> None:
    """Note that a network lives; it is forgotten when it is gone."""
    _LIVING.add(net)


def check_free(net: Network) -> None:
    """Raise `PlasticError` if the model of a new network has parameters that the gates of another network act on.

    It is also raised if the new network's gates act on parameters of another network's model. A model that both only
    read, such as a frozen part without gates, may be shared.
    """
    if _shared(net) is not None:
        gc.collect()  # because a network refers to itself, and so outlives its last name
    if (name := _shared(net)) is not None:
        raise PlasticError(
            f"{type(net.model).__name__}: another PlasticNet has gates on this model, or on a part of it ({name!r}). "
            "Use that one, delete it first (del net, and whatever refers to it, such as a Schedule), or gate a copy of "
            "the model (copy.deepcopy)"
        )


def _shared(net: Network) -> str | None:
    """Return the name of a parameter on which the gates of one network act and that another network has, too."""
    held = {id(p): name for name, p in net.model.named_parameters()}
    acted = {id(p) for p in net.acted_on().values()}
    for other in list(_LIVING):
        if other is not net:
            theirs = {id(p) for p in other.acted_on().values()}
            mine = acted & {id(p) for p in other.model.parameters()}
            for key, name in held.items():
                if key in theirs or key in mine:
                    return name
    return None
