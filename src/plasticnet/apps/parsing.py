"""Reads dataclasses and plain records from JSON, strictly: missing fields and wrong types are refused by name."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from plasticnet.errors import PlasticError

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_LOWEST, _HIGHEST = -(2**63), 2**64  # of the whole numbers that torch and NumPy know, the latter without itself
_LONE = re.compile("[\\ud800-\\udfff]")  # half of a letter, as JSON and names of files can hold it


def parse(kind: Any, value: Any, where: str = "") -> Any:
    """Return a value of JSON as one of a type.

    Args:
        kind: A dataclass, whose fields are all there and no others; a `TypedDict`, beside whose fields there may be
            others, which are left out; a tuple or list of one type; a dict; a literal; a union; or int, float, str,
            bool or None.
        value: The value as JSON gives it.
        where: The names of the fields that lead to it, for the message.

    Raises:
        PlasticError: A field is unknown or missing, or has a value of another type; a number is too large; or a text
            holds what is no letter, so that it could not be written.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        return _object(kind, value, where)
    if is_typeddict(kind):
        return _record(kind, value, where)
    if get_origin(kind) in (Union, UnionType):
        return _one_of(get_args(kind), value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(parse(get_args(kind)[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if get_origin(kind) is list and isinstance(value, list):
        return [parse(get_args(kind)[0], entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, dict):
        key, inner = get_args(kind)
        return {
            parse(key, name, _within(where, "a name")): parse(inner, v, _within(where, name))
            for name, v in value.items()
        }
    if get_origin(kind) is Literal and isinstance(value, str) and value in get_args(kind):
        return value
    if type(value) is int and not _LOWEST <= value < _HIGHEST:
        raise PlasticError(f"{where or 'the whole'} is a number with {len(str(abs(value)))} digits, and too large")
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in _WORDS and type(value) is kind:
        if isinstance(value, str) and not is_unicode(value):
            raise PlasticError(f"{where or 'the whole'} is {_shown(value)}, which holds what is no letter of Unicode")
        return value
    raise PlasticError(f"{where or 'the whole'} is {_shown(value)}, and must be {_needed(kind)}")


def is_unicode(text: str) -> bool:
    """Return whether a text can be written. The name of a file that is not UTF-8 cannot."""
    return not _LONE.search(text)


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
    return kind(**{n: parse(types[n], value[n], _within(where, n)) for n in names})


def _record(kind: Any, value: Any, where: str) -> dict[str, Any]:
    """Return those fields of a JSON object that a `TypedDict` has."""
    if not isinstance(value, dict):
        raise PlasticError(f"{where or 'the whole'} is {_shown(value)}, and must be an object of JSON")
    found: dict[str, Any] = {}
    for name, inner in get_type_hints(kind, include_extras=True).items():
        optional = get_origin(inner) is NotRequired
        if name in value:
            found[name] = parse(get_args(inner)[0] if optional else inner, value[name], _within(where, name))
        elif not optional:
            raise PlasticError(f"the field {name!r}{f' in {where}' if where else ''} is missing")
    return found


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


def _within(where: str, name: str) -> str:
    """Return the names that lead to a field within others."""
    return f"{where}.{name[:60]}" if where else name[:60]


def _needed(kind: Any) -> str:
    """Return a type in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if is_typeddict(kind) or get_origin(kind) is dict:
        return "an object of JSON"
    return _WORDS.get(kind, "a list")


def _shown(value: Any) -> str:
    """Return a value in a few words."""
    return {dict: "an object", list: "a list"}.get(type(value), ascii(value)[:60])
