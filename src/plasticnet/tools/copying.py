"""Copies objects whatever they hold: by value where that is possible, and by reference where it is not.

``copy.deepcopy`` gives up on a model that keeps results of a computation, such as attention maps in a list, and on one
that holds a lock, an open file, a generator or a socket. Here the former are copied without their graph, and the latter
are shared by both models. A function that has hold of a part of the model, such as a hook or a forward that was put in
the place of another, has hold of the part of the copy in the copy. Everything else is copied as ``deepcopy`` does it.
"""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping
from concurrent.futures import Executor
from contextlib import suppress
from copy import deepcopy
from threading import Thread
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    EllipsisType,
    FunctionType,
    MethodType,
    ModuleType,
    NotImplementedType,
)
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.tools.torch_private import is_transformed

# Values of these types have no parts that could differ between two copies.
_PLAIN = {
    type(None), EllipsisType, NotImplementedType, bool, int, float, complex, bytes, str, range, property, CodeType,
    BuiltinFunctionType,
}  # fmt: skip
_SHARED = (type, ModuleType, ref, Thread, Executor)  # the classes of what copies of a model share
_NOTHING = object()
_EXHAUSTED = (MemoryError, torch.OutOfMemoryError, RecursionError)


def deep_copy(value: Any, known: Mapping[int, Any] | None = None) -> Any:
    """Return a deep copy of a value, which shares with the value only what cannot be copied.

    Args:
        value: What to copy. Modules within it are copied or refused, and never shared.
        known: Copies of some of its parts, by the ids of the parts.

    Raises:
        PlasticError: A module refuses to be copied.
    """
    own = [*value.modules(), *value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else []
    return _Copier(known or {}, own).copy(value)


class _Copier:
    """Copies one object and its parts; every part is copied once.

    Args:
        known: Copies of some parts, by the ids of the parts.
        own: The modules and tensors of which a function in the copy must have hold of the copies.
    """

    def __init__(self, known: Mapping[int, Any], own: Iterable[Any]) -> None:
        self._memo: dict[Any, Any] = dict(known)  # in the form that ``__deepcopy__`` takes
        self._own = {id(part) for part in own}
        self._alive: list[Any] = []  # keeps what was copied alive, so that ids stay unique

    def copy(self, x: Any) -> Any:
        """Return the copy of an object."""
        if type(x) in _PLAIN:
            return x
        found = self._memo.get(id(x), _NOTHING)
        if found is not _NOTHING:
            return found
        new = self._copied(x)
        self._memo[id(x)] = new
        self._alive.append(x)
        return new

    def _copied(self, x: Any) -> Any:
        """Return the copy of an object that was not copied before."""
        kind: Any = type(x)
        if isinstance(x, Tensor):
            return self._tensor(x)
        if kind is list:
            self._memo[id(x)] = new = []  # It is known before its parts are copied, because it may contain itself.
            for value in x:
                new.append(self.copy(value))
            return new
        if kind is dict:
            self._memo[id(x)] = new = {}
            for key, value in x.items():
                new[self.copy(key)] = self.copy(value)
            return new
        if kind is OrderedDict and not vars(x):  # every module has a dozen of these, and a set
            self._memo[id(x)] = new = OrderedDict()
            for key, value in x.items():
                new[self.copy(key)] = self.copy(value)
            return new
        if kind is set and all(type(value) in _PLAIN for value in x):
            self._memo[id(x)] = plain = set(x)
            return plain
        if kind is tuple:
            parts = tuple([self.copy(value) for value in x])
            return self._memo.get(id(x), parts if any(a is not b for a, b in zip(x, parts, strict=True)) else x)
        if kind is MethodType:
            return MethodType(x.__func__, self.copy(x.__self__))
        if kind is FunctionType:
            return self._function(x) if self._holds_own(x, set()) else x
        owner = hasattr(kind, "__del__") and not isinstance(x, nn.Module)
        if owner or isinstance(x, _SHARED):  # A copy that is deleted would close what its owner still uses.
            return x
        size = len(self._memo)
        try:
            own = getattr(kind, "__deepcopy__", None)
            return self._by_parts(x) if own is None else own(x, self._memo)
        except (PlasticError, *_EXHAUSTED):
            raise
        except Exception as error:
            for key in list(self._memo)[size:]:  # Copies that were begun may lack some of their parts.
                del self._memo[key]
            return self._otherwise(x, error)

    def _tensor(self, x: Tensor) -> Tensor:
        """Return the copy of a tensor: without its graph, and without a gradient that has one."""
        if is_transformed(x):  # It was made within a transformation of torch.func, and cannot be read outside of it.
            return x
        if not x.is_leaf:
            return x.detach().clone()
        if x.grad is not None and not x.grad.is_leaf:
            return x.detach().clone().requires_grad_()
        for value in vars(x).values():
            self.copy(value)
        return deepcopy(x, self._memo)

    def _holds_own(self, x: Any, seen: set[int]) -> bool:
        """Return whether a value is a part of the model, or has hold of one.

        Args:
            x: The value. Functions, methods and containers are searched, and other objects are not.
            seen: The ids of what was searched before.
        """
        if id(x) in self._own:
            return True
        if type(x) in _PLAIN or id(x) in seen:
            return False
        seen.add(id(x))
        if type(x) is MethodType:
            return self._holds_own(x.__self__, seen)
        parts: Iterable[Any] = ()
        if type(x) is FunctionType:
            parts = [*_contents(x), *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        elif isinstance(x, dict):
            parts = x.values()
        elif isinstance(x, (list, tuple, set, frozenset)):
            parts = x
        return any(self._holds_own(part, seen) for part in parts)

    def _function(self, x: FunctionType) -> FunctionType:
        """Return a function that has hold of the copies of what a function has hold of, as far as that is the model."""
        cells = tuple(CellType() for _ in x.__closure__ or ())
        self._memo[id(x)] = new = FunctionType(x.__code__, x.__globals__, x.__name__, None, cells)

        def held(part: Any) -> Any:
            return self.copy(part) if self._holds_own(part, set()) else part

        for cell, old in zip(cells, x.__closure__ or (), strict=True):
            with suppress(ValueError):  # The cell is still empty.
                cell.cell_contents = held(old.cell_contents)
        new.__defaults__ = x.__defaults__ and tuple(held(part) for part in x.__defaults__)
        new.__kwdefaults__ = x.__kwdefaults__ and {name: held(part) for name, part in x.__kwdefaults__.items()}
        new.__qualname__, new.__module__, new.__doc__ = x.__qualname__, x.__module__, x.__doc__
        new.__annotations__ = dict(x.__annotations__)
        new.__dict__.update({name: held(part) for name, part in vars(x).items()})
        return new

    def _by_parts(self, x: Any) -> Any:
        """Return an object made anew from the parts that pickle would save."""
        reduce = copyreg.dispatch_table.get(type(x))
        parts: Any = x.__reduce_ex__(4) if reduce is None else reduce(x)
        if isinstance(parts, str):
            return x
        pieces: tuple[Any, ...] = (*parts, None, None, None, None)
        make, args, state, items, pairs, put = pieces[:6]
        self._memo[id(x)] = new = make(*[self.copy(a) for a in args])
        if state is not None:
            state = self.copy(state)
            if put is not None:
                put(new, state)
            elif hasattr(new, "__setstate__"):
                new.__setstate__(state)
            else:
                own, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                new.__dict__.update(own or {})
                for name, value in (slots or {}).items():
                    setattr(new, name, value)
        for item in items or ():
            new.append(self.copy(item))
        for key, value in pairs or ():
            new[self.copy(key)] = self.copy(value)
        return new

    def _otherwise(self, x: Any, error: Exception) -> Any:
        """Return the copy of an object that refuses to be copied; if nothing helps, this is the object itself.

        ``__deepcopy__`` of a module or of a mapping copies the parts by ``copy.deepcopy``, which may fail for a part.
        Here the parts are copied one by one.

        Raises:
            PlasticError: The object is a module, whose parameters must not be shared.
        """
        kind: Any = type(x)
        if isinstance(x, nn.Module):
            if isinstance(x, torch.jit.ScriptModule):  # Its parts do not lie in its attributes.
                raise _refusal(x, error) from error
            self._memo[id(x)] = new = object.__new__(kind)  # GraphModule.__new__ would make another class
            try:
                for name, value in vars(x).items():
                    if name != "_compiled_call_impl":  # what was compiled runs the original
                        new.__dict__[name] = self.copy(value)
            except (PlasticError, *_EXHAUSTED):
                raise
            except Exception as second:
                raise _refusal(x, second) from error
            return new
        if isinstance(x, MutableMapping):
            with suppress(Exception):
                new = kind()
                for key, value in list(x.items()):
                    new[self.copy(key)] = self.copy(value)
                return new
        return x


def _contents(function: FunctionType) -> list[Any]:
    """Return what lies in the cells of a function's closure; a cell may still be empty."""
    found = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def _refusal(module: nn.Module, error: Exception) -> PlasticError:
    """Return the error for a module that cannot be copied."""
    return PlasticError(
        f"a module of class {type(module).__name__} cannot be copied, but copies of it must be run and cut so that it "
        f"stays as it is: {error}. Give the class a __deepcopy__, or keep outside of it what the message names."
    )
