"""Hugging Face: a compacted transformers model that its own config describes.

Such a model has one width for all layers. `equalise` brings a network there, and `save_pretrained`
finds the fields of the config that say so, by trying.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.files.exporting import check_outputs, evaluation, outputs
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import Optimizers
from plasticnet.tools.inputs import call_arguments, transformer_inputs
from plasticnet.units import InputUnits

_WAY_OUT = "use plasticnet.save, whose recipe holds any widths"
_UNSET = {"n_inner": ("n_embd", 4)}  # fields that may be None, and what they then are a multiple of
Fields = dict[str, float]  # of a config, and their values: widths, numbers of heads, a ratio of widths
Shapes = dict[str, tuple[int, ...]]


def equalise(net: PlasticNet, optimizer: Optimizers = None) -> dict[str, int]:
    """Give the layers of a transformers model equal widths: each site gets as many open units as the
    widest site of its kind (by the class of the layer, its name in there, and its original width).

    The most probable of the closed units are opened; where units were cut already, new ones are added
    that leave the outputs alone (see `PlasticNet.resize`, also for ``optimizer``). Returns the number of
    open units per site.

    Raises `PlasticError` when the network's model has no transformers config.
    """
    original = _shapes(net.model, _config(net.model))
    kinds: dict[Any, list[str]] = {}
    for name, site in net.sites.items():
        own = [s for s in site.units.slices if s.tensor in original]
        if own and not isinstance(site.units, InputUnits):
            parent, _, leaf = name.rpartition(".")
            width = original[own[0].tensor][own[0].dim]
            kinds.setdefault((type(net.model.get_submodule(parent)), leaf, width), []).append(name)
    counts: dict[str, int] = {}
    for names in kinds.values():
        counts.update(dict.fromkeys(names, max(1, *(int(net.sites[n].open.sum()) for n in names))))
    missing = {n: count - len(net.sites[n]) for n, count in counts.items() if count > len(net.sites[n])}
    if missing:
        net.grow(missing, optimizer)
    with torch.no_grad():
        for name, count in counts.items():
            phi = net.sites[name].phi
            least = phi[phi >= 0].min() if bool((phi >= 0).any()) else phi.new_zeros(())
            best = phi.topk(count).indices
            phi[best] = phi[best].clamp(min=least)
    return counts


def save_pretrained(module: nn.Module, folder: str | os.PathLike[str], example: Any = None) -> Fields:
    """Write a compacted transformers model so that ``type(module).from_pretrained(folder)`` gives it back.

    The fields of its config that hold widths are set to what was found, in ``module.config`` too, and
    returned. The loaded model is compared with the module on ``example`` inputs, a tuple or a dict
    (default: random token ids, or pixels).

    Raises `PlasticError`, and writes nothing, when no config describes the module: layers that differ,
    or a width that the config does not have (BERT's size of a head, say).
    """
    config = _config(module)
    found = _fit(module, config)
    before = {field: getattr(config, field, None) for field in found}
    folder = Path(folder)
    for field, value in found.items():
        setattr(config, field, value)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
            writer: Any = module
            writer.save_pretrained(partial)
            _compare(module, partial, example)
            folder.mkdir(exist_ok=True)
            for file in Path(partial).iterdir():
                os.replace(file, folder / file.name)
    except Exception as error:  # what transformers makes of the config, or the file system's
        for field, value in before.items():
            setattr(config, field, value)
        if isinstance(error, PlasticError):
            raise
        what = " ".join(str(error).split()) or repr(error)
        raise PlasticError(f"{type(module).__name__} cannot be saved to {folder}: {what}; {_WAY_OUT}") from error
    return found


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(module, "save_pretrained"):
        raise PlasticError(f"{type(module).__name__} is not a transformers model; {_WAY_OUT}")
    return config


def _shapes(module: nn.Module, config: Any) -> Shapes:
    """What the architecture has with this config."""
    make: Any = type(module)
    with torch.device("meta"):
        fresh: nn.Module = make(copy.deepcopy(config))
    return {name: tuple(t.shape) for name, t in fresh.state_dict().items()}


def _fit(module: nn.Module, config: Any) -> Fields:
    """The fields to change, and their values, with which the config builds the module's shapes."""
    original = _shapes(module, config)
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    extra = sorted(original.keys() ^ wanted.keys())[:3]
    if extra:
        raise PlasticError(f"{type(module).__name__} has not the names of its config's model: {extra}; {_WAY_OUT}")
    _check_uniform(original, wanted)
    fields = {f: v for f, v in config.to_dict().items() if type(v) is int and v > 0 and "head_dim" not in f}
    fields |= {f: n * getattr(config, of) for f, (of, n) in _UNSET.items() if getattr(config, f, n) is None}
    changed = {(a, b) for n in wanted for a, b in zip(original[n], wanted[n], strict=True) if a != b}
    tries: set[tuple[str, float]] = {
        (f, v * b // a) for f, v in fields.items() for a, b in changed if a % v == 0 and v * b % a == 0
    }
    ratio = getattr(config, "mlp_ratio", None)
    if isinstance(ratio, float):
        tries |= {("mlp_ratio", ratio * b / a) for a, b in changed}
    heads, hidden = (getattr(config, f, None) for f in ("num_attention_heads", "hidden_size"))
    # Many models derive the size of a head, but take it from the config where that says it.
    derived = {"head_dim": hidden // heads} if type(heads) is type(hidden) is int and heads else {}
    wrong: list[str] = []
    for start in ({}, derived):
        found, wrong = _search(module, config, wanted, sorted(tries), start)
        if not wrong:
            return found
    raise PlasticError(
        f"no config of {type(module).__name__} has these widths: {_some(wrong, wanted)} (some derive the size of a "
        f"head from the number of heads). Exclude such sites from the network, or {_WAY_OUT}"
    )


def _search(
    module: nn.Module, config: Any, wanted: Shapes, tries: list[tuple[str, float]], start: Fields
) -> tuple[Fields, list[str]]:
    """Change one field after the other, each time the one that helps most. Returns the fields, and the
    names of the tensors that are still wrong."""
    found, wrong = start, _wrong(module, config, wanted, start)
    while wrong and tries:
        options = [{**found, field: value} for field, value in tries]
        outcomes = [(_wrong(module, config, wanted, option), option) for option in options]
        least, option = min(outcomes, key=lambda outcome: len(outcome[0]))
        if len(least) >= len(wrong):
            break
        found, wrong = option, least
    return found, wrong


def _wrong(module: nn.Module, config: Any, wanted: Shapes, fields: Fields) -> list[str]:
    """The tensors whose shape the config gets wrong with these fields."""
    changed = copy.deepcopy(config)
    try:
        for field, value in fields.items():
            setattr(changed, field, value)
        built = _shapes(module, changed)
    except Exception:  # a combination that the architecture refuses, in any way
        return list(wanted)
    return [name for name, shape in wanted.items() if built.get(name) != shape]


def _check_uniform(original: Shapes, wanted: Shapes) -> None:
    """Raise unless tensors that were equal up to the numbers in their names still are."""
    layers: dict[Any, dict[tuple[int, ...], str]] = {}
    for name, shape in wanted.items():
        layers.setdefault((_kind(name), original[name]), {}).setdefault(shape, name)
    apart = [list(seen.values()) for seen in layers.values() if len(seen) > 1]
    if apart:
        raise PlasticError(
            f"the layers differ in {len(apart)} tensors, and a config has one width for all: "
            f"{_some(apart[0], wanted)}. Call equalise(net) before net.compact(), or {_WAY_OUT}"
        )


def _kind(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _some(names: list[str], shapes: Shapes) -> str:
    return ", ".join(f"{name} {shapes[name]}" for name in names[:3])


def _compare(module: nn.Module, folder: str, example: Any) -> None:
    make: Any = type(module)
    name = make.__name__
    example = transformer_inputs(module) if example is None else example
    if example is None:
        raise PlasticError(f"{name} does not say what it reads: give save_pretrained an example of its inputs")
    args, kwargs = call_arguments(example)
    with evaluation(module):
        loaded = make.from_pretrained(folder).to(next(module.parameters()).device)
        with evaluation(loaded):
            check_outputs(outputs(module, args, kwargs), outputs(loaded, args, kwargs), f"{name} from its config")
