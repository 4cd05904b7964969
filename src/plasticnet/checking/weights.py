"""Finds the weights that can have a gate on every entry, and says why the others cannot."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from plasticnet.errors import PlasticError
from plasticnet.gates.run import Gating
from plasticnet.tools.inputs import copy_inputs
from plasticnet.tools.snapshot import duplicate, left_as_it_was, sharing
from plasticnet.tools.torch_private import is_scripted, parameters_of
from plasticnet.tools.trees import tensors_within
from plasticnet.units import SCRIPTED


def gateable(
    model: nn.Module, patterns: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """Find the weights whose entries can have gates, in the modules whose name matches a pattern.

    Args:
        model: The model, which is left as it was.
        patterns: Name patterns of modules.
        args: The positional arguments on which the model is run.
        kwargs: The keyword arguments on which the model is run.

    Returns:
        The names of the parameters that can be gated, and the names of those that cannot, with the reason.

    Raises:
        PlasticError: A pattern matches no module with a weight of two or more dimensions.
    """
    modules = {name: m for name, m in model.named_modules() if _has_matrix(m)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise PlasticError(
                f"weights={pattern!r} matches no module with a weight of two or more dimensions; these have one: "
                f"{', '.join(modules) or 'none'}"
            )
    places: dict[int, list[str]] = {}
    for name, m in model.named_modules():
        for leaf, p in parameters_of(m).items():
            places.setdefault(id(p), []).append(f"{name}.{leaf}".removeprefix("."))
    found: list[str] = []
    frozen: dict[str, str] = {}
    for name, m in modules.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            tensor = f"{name}.weight".removeprefix(".")
            reason = _reason(m, places.get(id(parameters_of(m).get("weight")), []))
            if reason:
                frozen[tensor] = reason
            else:
                found.append(tensor)
    for name, m in model.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            others = [
                leaf for leaf, p in parameters_of(m).items() if leaf != "weight" and p is not None and p.dim() > 1
            ]
            reason = 'only parameters of the name "weight" are gated entry by entry'
            frozen.update({f"{name}.{leaf}".removeprefix("."): reason for leaf in others})
    if _masking_differs(model, found, args, kwargs):
        wrong = [t for t in found if _masking_differs(model, [t], args, kwargs)] or found
        frozen.update(dict.fromkeys(wrong, "closing its entries is not what zeros in it are: something else reads it"))
        found = [t for t in found if t not in wrong]
    return found, frozen


def _has_matrix(module: nn.Module) -> bool:
    """Return whether a module has a weight of two or more dimensions, or one that is computed."""
    weight = parameters_of(module).get("weight")
    return weight.dim() > 1 if weight is not None else _computed(module)


def _computed(module: nn.Module) -> bool:
    """Return whether a module's weight is no parameter but is computed from others, as weight_norm does."""
    return parametrize.is_parametrized(module, "weight") or isinstance(module.__dict__.get("weight"), Tensor)


def _reason(module: nn.Module, places: list[str]) -> str:
    """Return why the weight of a module cannot be gated, or an empty text.

    Args:
        module: A module with a weight.
        places: All names under which the model holds this weight.
    """
    weight = parameters_of(module).get("weight")
    if is_scripted(module):
        return f"the module is {SCRIPTED}"
    if weight is None:
        return "the weight is computed from other parameters"
    if not weight.is_floating_point():
        return f"the weight is {weight.dtype}: neither half, single nor double precision"
    if len(places) > 1:
        return f"the weight is shared: {', '.join(places)}"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "the weight is a table to look rows up in: nothing is multiplied by its entries"
    return ""


def _masking_differs(model: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether closing random entries of these weights differs from setting the entries to zero.

    They differ where something reads a weight in a way that its gates do not reach. On the meta device there is nothing
    to compare, and the result is False.
    """
    parameters = dict(model.named_parameters())
    if not names or any(t.is_meta for t in (*parameters.values(), *model.buffers())):
        return False
    with left_as_it_was(model):
        masks = {n: torch.rand_like(parameters[n]).round() for n in names}
        zeros = {id(parameters[n]): nn.Parameter(parameters[n] * m) for n, m in masks.items()}
        masked, zeroed = sharing(model).eval(), duplicate(model, lambda p: zeros.get(id(p), p)).eval()
        gating = Gating({}, masked, names)
        one = torch.ones(1, device=next(iter(masks.values())).device)
        inputs = [copy_inputs((args, kwargs)) for _ in range(2)]
        found = tensors_within(gating.run(one, *inputs[0], all_open=True, weights=masks))
        expected = tensors_within(zeroed(*inputs[1][0], **inputs[1][1]))
    pairs = zip(found, expected, strict=True)
    return not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)
