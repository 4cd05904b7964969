"""Reads dataclasses from JSON, strictly: unknown and missing fields and wrong types are refused by name."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from plasticnet.errors import PlasticError

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def parse(kind: Any, value: Any, where: str = "") -> Any:
    """Return a value of JSON as one of a type.

    Args:
        kind: A dataclass, a tuple of one type, a literal, a union, or int, float, str, bool or None.
        value: The value as JSON gives it.
        where: The names of the fields that lead to it, for the message.

    Raises:
        PlasticError: A field is unknown or missing, or has a value of another type.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        return _object(kind, value, where)
    if get_origin(kind) in (Union, UnionType):
        return _one_of(get_args(kind), value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(parse(get_args(kind)[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in _WORDS and type(value) is kind:
        return value
    raise PlasticError(f"{where or 'the whole'} is {_shown(value)}, and must be {_needed(kind)}")


def _object(kind: type, value: Any, where: str) -> Any:
    """Return a JSON object as a dataclass."""
    if not isinstance(value, dict):
        raise PlasticError(f"{where or 'the whole'} is {_shown(value)}, and must be an object of JSON")
    names = [field.name for field in fields(kind)]
    at = f" in {where}" if where else ""
    if unknown := [name for name in value if name not in names]:
        raise PlasticError(f"the field {unknown[0]!r}{at} is not known; the fields are {', '.join(names)}")
    if missing := [name for name in names if name not in value]:
        raise PlasticError(f"the field {missing[0]!r}{at} is missing")
    types = get_type_hints(kind)
    return kind(**{n: parse(types[n], value[n], f"{where}.{n}" if where else n) for n in names})


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return a value as one of several types, of which one may be None."""
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    for kind in others[:-1]:
        try:
            return parse(kind, value, where)
        except PlasticError:
            continue
    return parse(others[-1], value, where)


def _needed(kind: Any) -> str:
    """Return a type in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return _WORDS.get(kind, "a list")


def _shown(value: Any) -> str:
    """Return a value in a few words."""
    return {dict: "an object", list: "a list"}.get(type(value), repr(value)[:60])
