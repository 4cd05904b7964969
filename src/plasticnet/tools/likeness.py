"""Makes a module that wraps another one look like it: with the signature of its forward, and a word on hidden names."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn


def with_signature(method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """Return a method with the signature of a model's forward, which tools read to see what the model takes.

    Args:
        method: A method that takes any arguments.
        signature: The signature, without ``self``.
    """

    @functools.wraps(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    kinds = {p.kind for p in signature.parameters.values()}
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        own = own.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # pyright: ignore[reportAttributeAccessIssue]
    return forward


def warn_of_shadows(net: nn.Module, model: nn.Module) -> None:
    """Warn of attributes of a model that are hidden by those of the network around it, such as ``net.k``.

    Call it in the constructor of the network.
    """
    plain = set(dir(nn.Module()))
    own = {n for n in dir(net) if not n.startswith("_")} - plain - {"model"}
    shadowed = sorted(own & set(dir(model)) - {"forward"})
    if shadowed:
        warnings.warn(
            f"{type(model).__name__} has attributes that PlasticNet has, too: {', '.join(shadowed)}. On the network "
            f"these are PlasticNet's; the model's are net.model.{shadowed[0]} and so on.",
            UserWarning,
            stacklevel=3,
        )
