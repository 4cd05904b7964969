"""Notices that the model of a network has got other modules, or shares parameters in another way, since it was gated.

What was traced then says nothing of these, and gates would not act on them.
"""

from __future__ import annotations

from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.tools.torch_private import children_of, is_scripted, parameters_of


class Structure:
    """The modules that a model has at a moment, and how many of its parameters are held in several places.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parents = [m for m in model.modules() if not is_scripted(m)]
        self._held = [(m, key, child) for m in parents for key, child in children_of(m).items() if child is not None]
        self._ties = _ties(model)

    def check(self) -> None:
        """Raise `PlasticError` if a module was replaced by another, or if parameters were tied or untied.

        A module may be wrapped by one that has the same parameters, as for checkpoints, and one that has no parameters
        may be replaced by another.
        """
        for parent, key, child in self._held:
            now = children_of(parent).get(key)
            if now is not child and not _alike(child, now):
                name = next((f"{n}.{key}" if n else key for n, m in self._model.named_modules() if m is parent), key)
                raise PlasticError(
                    f"{name!r}: this {type(child).__name__} was removed or replaced after PlasticNet was made, and the "
                    "gates do not know what is there now. Put it back, or change the model first and gate it then "
                    "(del net, and make a new PlasticNet)"
                )
        if _ties(self._model) != self._ties:
            raise PlasticError(
                f"{type(self._model).__name__}: parameters were tied, or tied ones separated, after PlasticNet was "
                "made, and the gates do not know of it. Put them back, or change the model first and gate it then (del "
                "net, and make a new PlasticNet)"
            )


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
