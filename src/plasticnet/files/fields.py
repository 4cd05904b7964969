"""Searches the fields of a transformers config from which transformers builds a model of given shapes, by trying.

A width may be a field of its own (``intermediate_size``), an entry of a list with one for each layer or stage
(``intermediate_size`` of Gemma 3n), or what ``per_layer_config`` says of a layer. Which of
these an architecture reads is nowhere written down, so each is tried on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

Fields = dict[str, Any]  # fields of a config and their values: widths, numbers of heads, a ratio, lists, layers
Shapes = dict[str, tuple[int, ...]]  # the shapes of tensors, by name
PER_LAYER = "per_layer_config"  # a dict of fields for each layer that differs from the others
_UNSET = {"n_inner": ("n_embd", 4)}  # a field that may be None, and is then a multiple of another one


def shapes_of(module: nn.Module, config: Any) -> Shapes:
    """Return the shapes that the architecture of a module has with a config."""
    make: Any = type(module)
    with torch.device("meta"):
        fresh: nn.Module = make(copy.deepcopy(config))
    return {name: tuple(t.shape) for name, t in fresh.state_dict().items()}


def set_fields(config: Any, fields: Fields) -> None:
    """Set fields of a config; ``per_layer_config`` comes last, because it is compared with the others."""
    for field, value in sorted(fields.items(), key=lambda item: item[0] == PER_LAYER):
        setattr(config, field, copy.deepcopy(value))


def kind_of(name: str) -> str:
    """Return what the names of corresponding tensors of all layers share: ``layer.#.weight``."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def layers_apart(original: Shapes, wanted: Shapes) -> list[list[str]]:
    """Return the tensors that correspond and have different shapes: for each kind, one name for each shape.

    Tensors correspond if their names differ in numbers only, and if their original shapes are equal.
    """
    layers: dict[Any, dict[tuple[int, ...], str]] = {}
    for name, shape in wanted.items():
        layers.setdefault((kind_of(name), original[name]), {}).setdefault(shape, name)
    return [list(seen.values()) for seen in layers.values() if len(seen) > 1]


class Search:
    """Looks for fields of a config, one after the other, and takes each time the one that helps most.

    Args:
        module: A module of the architecture.
        config: Its config, which is not changed.
        original: The shapes that the architecture has with this config.
        wanted: The shapes that it should have.
    """

    def __init__(self, module: nn.Module, config: Any, original: Shapes, wanted: Shapes) -> None:
        self._module, self._config, self._original, self._wanted = module, config, original, wanted

    def run(self, start: Fields) -> tuple[Fields, list[str]]:
        """Search, with some fields set from the start.

        Returns:
            The fields that were set, and the names of the tensors whose shapes are still wrong.
        """
        found, wrong = self._whole(start, self._wrong(start))
        return self._layers(found, wrong) if wrong else (found, wrong)

    def _wrong(self, fields: Fields) -> list[str]:
        """Return the names of the tensors that have another shape when the config has these fields."""
        changed = copy.deepcopy(self._config)
        try:
            set_fields(changed, fields)
            built = shapes_of(self._module, changed)
        except Exception:  # the architecture may refuse a combination of fields in any way
            return list(self._wanted)
        return [name for name, shape in self._wanted.items() if built.get(name) != shape]

    def _changes(self, names: Iterable[str]) -> set[tuple[int, int]]:
        """Return the lengths of dimensions that have changed in some tensors: before, and now."""
        pairs = (zip(self._original[n], self._wanted[n], strict=True) for n in names)
        return {(a, b) for dims in pairs for a, b in dims if a != b}

    def _whole(self, found: Fields, wrong: list[str]) -> tuple[Fields, list[str]]:
        """Set the fields that hold for all layers, as `run` does."""
        apart = {kind_of(n) for names in layers_apart(self._original, self._wanted) for n in names}
        changes = self._changes(n for n in self._wanted if kind_of(n) not in apart)
        fields = _widths(self._config)
        fields |= {
            f: n * getattr(self._config, of) for f, (of, n) in _UNSET.items() if _get(self._config, f, n) is None
        }
        tries: set[tuple[str, float]] = {(f, v) for f, old in fields.items() for v in _scaled(old, changes)}
        ratio = _get(self._config, "mlp_ratio")
        if isinstance(ratio, float):
            tries |= {("mlp_ratio", ratio * b / a) for a, b in changes}
        while wrong and tries:
            options = [{**found, field: value} for field, value in sorted(tries)]
            least, option = min(((self._wrong(o), o) for o in options), key=lambda outcome: len(outcome[0]))
            if len(least) >= len(wrong):
                break
            found, wrong = option, least
        return found, wrong

    def _layers(self, found: Fields, wrong: list[str]) -> tuple[Fields, list[str]]:
        """Set what holds for single layers, tensor by tensor, as `run` does."""
        useful, useless, passed = set[Any](), set[Any](), set[str]()
        while left := [name for name in wrong if name not in passed]:
            name, kind = left[0], kind_of(left[0])
            best, least = found, wrong
            places = [p for p in self._places(name, found) if p[0] in useful or (kind, p[0]) not in useless]
            for what, option in sorted(places, key=lambda place: place[0] not in useful):
                outcome = self._wrong(option)
                if len(outcome) < len(least):
                    best, least = option, outcome
                    useful.add(what)
                    if name not in outcome:
                        break
                else:
                    useless.add((kind, what))
            if best is found:
                passed.add(name)
            found, wrong = best, least
        return found, wrong

    def _places(self, name: str, found: Fields) -> Iterator[tuple[tuple[str, str], Fields]]:
        """Yield what may be set for the layer of a tensor: what kind of place it is, and the fields with it.

        Args:
            name: The tensor. The numbers in its name are tried as places in lists, and as numbers of layers.
            found: What was set before.
        """
        changes = self._changes([name])
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        lists = {f: v for f, v in self._config.to_dict().items() if isinstance(v, list | tuple)}
        for field, old in lists.items():
            now = list(found.get(field, old))
            for i in (n for n in numbers if n < len(old) and type(old[n]) is int):
                for value in _scaled(old[i], changes):
                    yield ("entry", field), {**found, field: [*now[:i], value, *now[i + 1 :]]}
        own = self._config.to_dict().get(PER_LAYER) or {}
        now = found.get(PER_LAYER, {int(i): layer for i, layer in own.items()})
        # Older versions of transformers know no layers that differ, and some configs do not count them.
        count = (_get(self._config, "num_hidden_layers") or 0) if hasattr(self._config, PER_LAYER) else 0
        for i in (n for n in numbers if n < count):
            for field, old in _widths(getattr(self._config, PER_LAYER)[i]).items():
                for value in _scaled(old, changes):
                    yield ("layer", field), {**found, PER_LAYER: {**now, i: {**now.get(i, {}), field: value}}}


def _get(config: Any, field: str, default: Any = None) -> Any:
    """Return a field of a config, or a default where there is none, or where it differs between layers."""
    try:
        return getattr(config, field)
    except (AttributeError, RuntimeError):  # transformers raises a RuntimeError of its own for fields that differ
        return default


def _widths(config: Any) -> dict[str, int]:
    """Return the fields of a config that may be widths. The size of a head is what the number of heads leaves."""
    return {f: v for f, v in config.to_dict().items() if type(v) is int and v > 0 and "head_dim" not in f}


def _scaled(old: int, changes: Iterable[tuple[int, int]]) -> set[int]:
    """Return the values that a field may have now, if it is a divisor of dimensions that have changed."""
    return {old * b // a for a, b in changes if old > 0 and a % old == 0 and old * b % a == 0} - {old, 0}
