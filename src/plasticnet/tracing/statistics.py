"""Notes which statistics over an axis are to be taken over the open units only, as in a norm of a residual stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from plasticnet.tools.torch_private import bound_arguments, schema_name
from plasticnet.tracing.labels import has_labels
from plasticnet.tracing.mode import Tracer
from plasticnet.units import Norm, owner

# What may take statistics over the open units only, by the names of ATen; other reductions freeze what they reduce.
STATISTICS = frozenset({"mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"})


def normalised(tracer: Tracer, func: Any, args: Any, kwargs: Any, dims: Sequence[int]) -> bool:
    """Note that a reduction is to count the open units only, where that is possible, or what else it reduces.

    Args:
        tracer: The tracer of the run.
        func: The reduction.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dims: The axes that it reduces.

    Returns:
        Whether it is possible.
    """
    x: Tensor = args[0]
    name = schema_name(func).removeprefix("aten::")
    if name not in STATISTICS or not tracer.calls:
        return False
    tag = tracer.tag(x)
    tracer.facts.means.update((tracer.calls[-1][0], d - x.dim(), name) for d in dims if not has_labels(tag.axes[d]))
    bound = bound_arguments(func, args, kwargs)
    labelled = [d for d in dims if has_labels(tag.axes[d])]
    if len(labelled) != 1 or bound["dim"] in (None, []):
        return False
    correction = bound.get("correction", bound.get("unbiased", 0))
    least = 1 + math.ceil(1 if correction is None else correction)
    return normalise(tracer, x, labelled[0], name, least=least)


def normalise(
    tracer: Tracer, x: Tensor, axis: int, statistic: str, vector: Tensor | None = None, least: int = 1
) -> bool:
    """Note that statistics over an axis are to be taken over the open units only, where that is possible.

    It is possible where masked norms were asked for and the running module owns a vector as long as the axis. The
    entries of the vector are joined with those of the axis.

    Args:
        tracer: The tracer of the run.
        x: The tensor whose statistics are taken.
        axis: The axis.
        statistic: The name of the operation.
        vector: The vector that the norm is given: a parameter of the module, or computed from one. None stands for any
            vector of the module.
        least: How many units must be open for the statistics to be numbers.

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
    tracer.facts.norms.setdefault(
        Norm(module, axis % x.dim() - x.dim(), *place, statistic.removeprefix("aten::"), least)
    )
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
