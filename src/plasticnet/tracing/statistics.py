"""Notes which statistics over an axis are to be taken over the open units only, as in a norm of a residual stream."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from plasticnet.tracing.mode import Tracer
from plasticnet.units import Norm, owner


def normalise(tracer: Tracer, x: Tensor, axis: int, vector: Tensor | None = None) -> bool:
    """Note that statistics over an axis are to be taken over the open units only, where that is possible.

    It is possible where masked norms were asked for and the running module owns a vector as long as the axis. The
    entries of the vector are joined with those of the axis.

    Args:
        tracer: The tracer of the run.
        x: The tensor whose statistics are taken.
        axis: The axis.
        vector: The vector that the norm is given: a parameter of the module, or computed from one. None stands for any
            vector of the module.

    Returns:
        Whether it is possible.
    """
    if not tracer.residual or not tracer.calls:
        return False
    module = tracer.calls[-1][0]
    ledger = tracer.ledger
    if vector is None:
        place = _own_vector(tracer, module, x.shape[axis])
        labels = ledger.fresh(*place, x.shape[axis]) if place else None
    else:
        labels = ledger.read(tracer.tag(vector), 0)
        own = all(i >= 0 and _owns(tracer, module, ledger.origin(int(i))[0]) for i in labels[[0, -1]])
        place = (_whole(tracer, labels) or _whole(tracer, ledger.read(tracer.tag(x), axis))) if own else None
    if place is None or labels is None:
        return False
    tracer.meet(ledger.read(tracer.tag(x), axis), labels, "a normalisation vector without units")
    tracer.facts.norms.setdefault(Norm(module, axis % x.dim() - x.dim(), *place))
    return True


def _own_vector(tracer: Tracer, module: str, length: int) -> tuple[str, int] | None:
    """Return the first parameter of a module that is a vector of this length, and the dimension of its entries."""
    for tensor in tracer.model.get_submodule(module).parameters(recurse=False):
        dims = [d for d, n in enumerate(tensor.shape) if n != 1]
        if len(dims) == 1 and tensor.shape[dims[0]] == length:
            return tracer.names[id(tensor)], dims[0]
    return None


def _owns(tracer: Tracer, module: str, tensor: str) -> bool:
    """Return whether a module holds this parameter or buffer, perhaps with others, or computes a weight from it."""
    held = tracer.model.get_submodule(module)
    own = [*held.parameters(recurse=False), *held.buffers(recurse=False)]
    return owner(tensor) == module or any(tracer.names.get(id(t)) == tensor for t in own)


def _whole(tracer: Tracer, labels: np.ndarray) -> tuple[str, int] | None:
    """Return the parameter and the dimension whose labels these are, all of them in order, or None."""
    if (labels < 0).any():
        return None
    tensor, dim = tracer.ledger.origin(int(labels[0]))
    whole = np.array_equal(labels, tracer.ledger.fresh(tensor, dim, len(labels)))
    return (tensor, dim) if whole and tensor in tracer.parameters else None
