"""Finds the tensors in what a model takes or returns: in containers, and in the attributes of objects."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from types import (
    BuiltinFunctionType,
    CodeType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_is_leaf, tree_leaves

# What holds no tensors, and occurs often.
_TORCH = (torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, slice, type(...), *_TORCH})
_CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, partial, GeneratorType, CoroutineType)
_CLOSED = (nn.Module, torch.Generator, CodeType, FrameType, *_CODE)
_VIEWS = tuple(type(v) for d in ({}, OrderedDict()) for v in (d.values(), d.items()))


def tensors_within(tree: Any) -> list[Tensor]:
    """Return the tensors that a caller can reach from a model's inputs or output.

    Containers are searched, and so are the attributes of objects, which need not be dataclasses. Properties are not
    read, because that would compute something. Modules, functions and generators are not searched, and neither are
    caches of keys and values, whose class is named ``Cache`` or ends with it, or derives from one of that name.

    Example:
        >>> from types import SimpleNamespace
        >>> a, b = torch.zeros(2), torch.zeros(3)
        >>> [len(t) for t in tensors_within([a, {"b": SimpleNamespace(found=(b, a))}])]
        [2, 3, 2]
    """
    if isinstance(tree, Tensor) and not tree.__dict__:  # the results of most functions
        return [tree]
    return _values_within(tree, Tensor)


def numbers_within(tree: Any) -> list[Tensor]:
    """Return the real and complex numbers in what a model returned, as tensors: also those in arrays of numpy."""
    found = _values_within(tree, (Tensor, np.ndarray, np.generic))
    arrays = [v for v in found if isinstance(v, Tensor) or v.dtype.kind in "fc"]
    tensors = [v if isinstance(v, Tensor) else torch.from_numpy(np.array(v)) for v in arrays]
    return [t for t in tensors if t.is_floating_point() or t.is_complex()]


def _values_within(tree: Any, wanted: type | tuple[type, ...]) -> list[Any]:
    """Return the values of these types that can be reached, in the order in which they are held."""
    found: list[Any] = []
    waiting, seen = [tree], dict[int, Any]()  # `seen` holds the objects, so that no other gets the id of one of them
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if isinstance(value, wanted):
            found.append(value)
            if not isinstance(value, Tensor) or not value.__dict__:
                continue
        elif kind in _ATOMS:
            continue
        elif kind is tuple:  # a tuple alone cannot hold itself
            waiting.extend(reversed(value))
            continue
        read = _reader(kind)
        if read is not None and id(value) not in seen:
            seen[id(value)] = value
            waiting.extend(reversed(read(value)))
    return found


@lru_cache(maxsize=1000)
def _reader(kind: type) -> Callable[[Any], list[Any]] | None:
    """Return what lists the parts of objects of a class, or None where the class is not searched."""
    if kind in _ATOMS or issubclass(kind, _CLOSED) or _is_cache(kind):
        return None
    if kind is dict:
        return lambda held: list(held.values())
    if kind is list:
        return list
    slots = [
        d for c in kind.__mro__ for n, d in vars(c).items() if isinstance(d, MemberDescriptorType) and n[:2] != "__"
    ]
    return lambda held: _parts(held, slots)


def _is_cache(kind: type) -> bool:
    """Return whether a class is a cache of keys and values, as the transformers library has them."""
    return kind.__name__.endswith("Cache") or any(c.__name__ == "Cache" for c in kind.__mro__)


def _parts(held: Any, slots: list[MemberDescriptorType]) -> list[Any]:
    """Return what a container or an object holds: its elements, and then the attributes that are not among them."""
    elements = _elements(held)
    known = {id(e) for e in elements}
    attributes: list[Any] = []
    with suppress(AttributeError):  # it has slots only
        attributes += object.__getattribute__(held, "__dict__").values()
    for slot in slots:
        with suppress(AttributeError):  # it has no value yet
            attributes.append(slot.__get__(held))
    return [*elements, *(a for a in attributes if id(a) not in known)]


def _elements(held: Any) -> list[Any]:
    """Return the elements of a container, read as its own kind reads them, since a subclass may compute them."""
    if isinstance(held, dict):
        return list(dict.values(held))
    if isinstance(held, MappingProxyType):
        return list(held.values())
    if isinstance(held, set | frozenset):
        return _in_order(held)
    if isinstance(held, list):
        return list(list.__iter__(held))
    if isinstance(held, tuple):
        return list(tuple.__iter__(held))
    if isinstance(held, deque):
        return list(deque.__iter__(held))
    if isinstance(held, np.ndarray):
        return held.ravel().tolist() if held.dtype == object else []
    if isinstance(held, _VIEWS):
        return list(held)
    return [] if tree_is_leaf(held) else tree_leaves(held, is_leaf=lambda part: part is not held)


def _in_order(held: set[Any] | frozenset[Any]) -> list[Any]:
    """Return the elements of a set, with its tensors in an order that is the same in every run of a model."""
    tensors = [t for t in held if isinstance(t, Tensor)]
    if len(tensors) > 1:
        size = {t: 0.0 if t.is_meta else t.detach().to(torch.complex128).abs().sum().item() for t in tensors}
        tensors.sort(key=lambda t: (t.shape, size[t]))
    return [*tensors, *(e for e in held if not isinstance(e, Tensor))]
