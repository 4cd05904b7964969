"""Notices that the model of a network has other modules or parameters, or shares some otherwise, than as it was gated.

What was traced then says nothing of these, and gates would not act on them.
"""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.tools.torch_private import children_of, is_scripted, parameters_of


class Structure:
    """The modules that a model has at a moment, with the names of their parameters, and how many of these are shared.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parents = [m for m in model.modules() if not is_scripted(m)]
        self._held = [(m, key, child) for m in parents for key, child in children_of(m).items() if child is not None]
        self._named = [(m, {key: p is None for key, p in parameters_of(m).items()}) for m in parents]
        self._ties = _ties(model)

    def check(self) -> None:
        """Raise `PlasticError` if a module was replaced, a parameter added or taken away, or some were tied or untied.

        A module may be wrapped by one that has the same parameters, as for checkpoints, and one that has no parameters
        may be replaced by another.
        """
        for parent, key, child in self._held:
            now = children_of(parent).get(key)
            if now is not child and not _alike(child, now):
                name = self._name(parent, key)
                raise PlasticError(
                    f"{name!r}: this {type(child).__name__} was removed or replaced after PlasticNet was made, and the "
                    "gates do not know what is there now. Put it back, or change the model first and gate it then "
                    "(del net, and make a new PlasticNet)"
                )
        for module, named in self._named:
            now = parameters_of(module)
            if any((now.get(key) is None) is not empty for key, empty in named.items()):
                self._refuse(module, named)
        if _ties(self._model) != self._ties:
            raise PlasticError(
                f"{type(self._model).__name__}: parameters were tied, or tied ones separated, after PlasticNet was "
                "made, and the gates do not know of it. Put them back, or change the model first and gate it then (del "
                "net, and make a new PlasticNet)"
            )

    def _refuse(self, module: nn.Module, named: dict[str, bool]) -> NoReturn:
        """Raise `PlasticError` for a module of which one of the parameters was added or taken away.

        Args:
            module: The module.
            named: The names of the parameters that it had or could have, and whether it had none there.
        """
        now = parameters_of(module)
        key = next(key for key, empty in named.items() if (now.get(key) is None) is not empty)
        done = "added" if named[key] else "parametrized or removed" if key not in now else "removed"
        raise PlasticError(
            f"{self._name(module, key)!r}: this parameter of a {type(module).__name__} was {done} after PlasticNet was "
            "made, as by weight_norm, spectral_norm or torch.nn.utils.prune, and the gates do not know what is there "
            "now. Undo it, or change the model first and gate it then (del net, and make a new PlasticNet)"
        )

    def _name(self, parent: nn.Module, key: str) -> str:
        """Return the name of what a module of the model holds under a key."""
        return next((f"{n}.{key}" if n else key for n, m in self._model.named_modules() if m is parent), key)


def _alike(then: nn.Module, now: nn.Module | None) -> bool:
    """Return whether what stands in the place of a module has its parameters, and the module itself if it has some."""
    own = {id(p) for p in then.parameters()}
    if own != {id(p) for p in (() if now is None else now.parameters())}:
        return False
    return not own or (now is not None and any(m is then for m in now.modules()))


def _ties(model: nn.Module) -> int:
    """Return how many parameters modules hold beyond the first place of each."""
    held = [id(p) for m in model.modules() for p in parameters_of(m).values() if p is not None]
    return len(held) - len(set(held))
