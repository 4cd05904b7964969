"""Reference architectures, and how a model is named on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from plasticnet.errors import PlasticError


class MLP(nn.Sequential):
    """Fully connected with ReLU: ``MLP([784, 300, 100, 10])`` on (batch, ...) flattened."""

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for n, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Linear(a, b), nn.ReLU()] if n < len(widths) - 2 else [nn.Linear(a, b)]
        super().__init__(*layers)


class LeNet5(nn.Module):
    """LeNet-5-Caffe, 20-50-500: (batch, 1, 28, 28) to (batch, 10); 800 features behind the flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu()).flatten(1)
        return self.fc2(self.fc1(x).relu())


def factory(name: str, shape: Sequence[int], classes: int) -> Callable[[], nn.Module]:
    """A factory for ``mlp:300-100``, ``lenet5``, ``torchvision:NAME`` or ``PACKAGE:FACTORY``.

    ``shape`` is that of one input and ``classes`` the number of outputs (an MLP needs both).
    Raises `PlasticError` when there is no such model.
    """
    head, _, tail = name.partition(":")
    if name == "lenet5":
        return LeNet5
    if head == "mlp":
        try:
            hidden = [int(w) for w in tail.split("-")]
            if min(hidden) < 1:
                raise ValueError
        except ValueError:
            raise PlasticError(f"model {name!r}: write the hidden widths as in mlp:300-100") from None
        features = 1
        for n in shape:
            features *= n
        return lambda: MLP([features, *hidden, classes])
    if head == "torchvision":
        models = _import("torchvision.models", name)
        return lambda: _call(models.get_model, name, tail, weights=None)
    if tail:
        function = getattr(_import(head, name), tail, None)
        if not callable(function):
            raise PlasticError(f"model {name!r}: {head} has no factory {tail!r}")
        return lambda: _call(function, name)
    raise PlasticError(f"unknown model {name!r}: use mlp:300-100, lenet5, torchvision:NAME or PACKAGE:FACTORY")


def _import(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except (ImportError, ValueError, TypeError) as error:
        raise PlasticError(f"model {name!r}: cannot import {package}: {error}") from error


def _call(function: Any, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    try:
        model = function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise PlasticError(f"model {name!r}: {error}") from error
    if not isinstance(model, nn.Module):
        raise PlasticError(f"model {name!r} is a {type(model).__name__}, not an nn.Module")
    return model
