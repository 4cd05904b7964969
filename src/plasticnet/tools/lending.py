"""Lets one thread find other tensors in the place of a module's parameters, while others go on finding these."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from plasticnet.tools.torch_private import parameters_of


class _Lent(dict[str, Any]):
    """The parameters of a module while one thread finds other tensors in their place; other threads find these.

    As a plain dict it holds the parameters, which is what copies of the module get. A tensor that the thread itself
    puts in the place of one that was lent to it, as ``torch.func.functional_call`` does, is lent to it, too.

    Args:
        under: What the module keeps its parameters in, itself or what was lent before.
        tensors: The other tensors, by name.
    """

    def __init__(self, under: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(dict.items(under))
        self.under = under
        self._tensors, self._thread = dict(tensors), threading.get_ident()

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[list[tuple[str, Any]]]]:
        return dict, (list(dict.items(self)),)

    def __getitem__(self, key: str) -> Any:
        if threading.get_ident() == self._thread and key in self._tensors:
            return self._tensors[key]
        return self.under[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if threading.get_ident() == self._thread and key in self._tensors:
            self._tensors[key] = value
        else:
            self.under[key] = value
            super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._tensors.pop(key, None)
        del self.under[key]
        super().__delitem__(key)

    def __iter__(self) -> Iterator[str]:  # With an iterator of its own, ``dict(...)`` and ``|`` read by __getitem__.
        return super().__iter__()

    # nn.Module and its subclasses use these of a dict's other methods.

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def items(self) -> Any:
        return [(key, self[key]) for key in list(self)]

    def values(self) -> Any:
        return [self[key] for key in list(self)]

    def copy(self) -> dict[str, Any]:
        return dict(self.items())


def lend(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let this thread find other tensors in the place of a module's parameters, until `take_back`.

    Other threads go on finding the parameters. The compiler, which reads the dict of the parameters past its methods,
    and TorchScript, which keeps none, would not notice; for these use `parameters_of`.

    Args:
        module: The module, which is not scripted.
        tensors: The tensors, by the names of the parameters that they replace.
    """
    module.__dict__["_parameters"] = _Lent(parameters_of(module), tensors)


def take_back(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Let a module have its parameters again.

    Args:
        module: The module.
        parameters: What `parameters_of` returned before something was lent.
    """
    module.__dict__["_parameters"] = parameters
