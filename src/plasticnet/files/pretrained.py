"""Writes compact transformers models in the format of Hugging Face, where a config describes the model.

`save_pretrained` finds the fields of the config that describe the widths, by trying. Most architectures read one width
for all layers; `equalise` gives the layers of a network equal widths.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.files.exporting import check_outputs, evaluation, outputs
from plasticnet.files.fields import Fields, Search, kind_of, layers_apart, set_fields, shapes_of
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import Optimizers
from plasticnet.tools.inputs import call_arguments, transformer_inputs
from plasticnet.units import InputUnits

_WAY_OUT = "use plasticnet.save, whose recipe holds any widths"


def equalise(net: PlasticNet, optimizer: Optimizers = None) -> dict[str, int]:
    """Give the layers of a transformers model equal widths, so that `save_pretrained` can write the compact model.

    Architectures that read a width for each layer do not need it: see `save_pretrained`.

    Each site gets as many open units as the site of its kind that has most. Two sites are of the same kind if they are
    produced by layers of the same name, in modules of the same class, and with the same original width. Closed units
    are opened, the most probable ones first. Where too few are left, new units are added, which leave the outputs as
    they are.

    Args:
        net: The network.
        optimizer: The optimizer that holds the parameters, or all of those that do; needed where units are added.

    Returns:
        For each site the number of its units that are open now. Input sites are left alone, and left out.

    Raises:
        PlasticError: The network's model is no transformers model, or units cannot be added (see `PlasticNet.resize`).

    Example:
        >>> import torch, transformers, plasticnet as pn
        >>> sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
        >>> bert = transformers.BertModel(transformers.BertConfig(**sizes))
        >>> net = pn.PlasticNet(bert, {"input_ids": torch.randint(20, (2, 5))}, exclude="*attention*")
        >>> first, second = net.sites.values()
        >>> with torch.no_grad():  # closes three units of the first layer, and eight of the second
        ...     first.phi[:3], second.phi[:8] = -1.0, -1.0
        >>> pn.equalise(net)
        {'encoder.layer.0.intermediate.dense': 9, 'encoder.layer.1.intermediate.dense': 9}
    """
    original = shapes_of(net.model, _config(net.model))
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
    """Write a compact transformers model so that ``type(module).from_pretrained(folder)`` gives it back.

    The fields of the config that hold widths are set to those of the module, also in ``module.config``. Where the
    layers differ, these are entries of lists, or fields of ``per_layer_config``, if the architecture reads them. Before
    the files appear in the folder, the model is loaded from them and compared with the module.

    Args:
        module: The compact model.
        folder: Where the files are written. It is made if it does not exist, but the folder around it must exist.
        example: The inputs on which the models are compared: a tuple of arguments or a dict of keyword arguments. By
            default these are random token ids or pixels, as the config says.

    Returns:
        The fields of the config that were set, and their values.

    Raises:
        PlasticError: No config describes the module, because its layers differ and the architecture reads one width
            for all, or because it has no field for a width (as for the size of a head in BERT); the module is no
            transformers model; or the loaded model gives other outputs. Nothing was written.

    Example:
        >>> import tempfile, torch, transformers, plasticnet as pn
        >>> sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
        >>> bert = transformers.BertModel(transformers.BertConfig(**sizes))
        >>> net = pn.PlasticNet(bert, {"input_ids": torch.randint(20, (2, 5))}, exclude="*attention*")
        >>> net.resize({name: range(9) for name in net.sites})  # cuts three of twelve units in both layers
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn.save_pretrained(net.compact(), folder)
        ...     again = transformers.BertModel.from_pretrained(folder)
        {'intermediate_size': 9}
        >>> again.encoder.layer[1].intermediate.dense
        Linear(in_features=8, out_features=9, bias=True)
    """
    config = _config(module)
    found = _fit(module, config)
    before = copy.deepcopy(vars(config))
    folder = Path(folder)
    try:
        set_fields(config, found)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
            writer: Any = module
            writer.save_pretrained(partial)
            _compare(module, partial, example)
            folder.mkdir(exist_ok=True)
            for file in Path(partial).iterdir():
                os.replace(file, folder / file.name)
    except Exception as error:  # from transformers, which may refuse the config in any way, or the file system
        vars(config).clear()
        vars(config).update(before)
        if isinstance(error, PlasticError):
            raise
        what = " ".join(str(error).split()) or repr(error)
        raise PlasticError(f"{type(module).__name__} cannot be saved to {folder}: {what}; {_WAY_OUT}") from error
    return found


def _config(module: nn.Module) -> Any:
    """Return the config of a transformers model. Raises `PlasticError` for other modules."""
    config = getattr(module, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(module, "save_pretrained"):
        raise PlasticError(f"{type(module).__name__} is not a transformers model; {_WAY_OUT}")
    return config


def _fit(module: nn.Module, config: Any) -> Fields:
    """Find the fields to change, and their values, so that the config describes the shapes of the module.

    Raises:
        PlasticError: The module has tensors of other names than its config describes, or no config was found.
    """
    original = shapes_of(module, config)
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    extra = sorted(original.keys() ^ wanted.keys())[:3]
    if extra:
        raise PlasticError(f"{type(module).__name__} has not the names of its config's model: {extra}; {_WAY_OUT}")
    search, wrong = Search(module, config, original, wanted), list[str]()
    heads, hidden = (config.to_dict().get(f) for f in ("num_attention_heads", "hidden_size"))
    # Many models compute the size of a head, but take it from the config if the config has a field for it.
    derived = {"head_dim": hidden // heads} if type(heads) is type(hidden) is int and heads else {}
    for start in ({}, derived):
        found, wrong = search.run(start)
        if not wrong:
            return found
    apart = [names for names in layers_apart(original, wanted) if kind_of(names[0]) in map(kind_of, wrong)]
    if apart:
        raise PlasticError(
            f"the layers differ in {len(apart)} tensors, and {type(module).__name__} reads one width for all: "
            f"{_some(apart[0], wanted)}. Call equalise(net) before net.compact(), or {_WAY_OUT}"
        )
    raise PlasticError(
        f"no config of {type(module).__name__} has these widths: {_some(wrong, wanted)} (some derive the size of a "
        f"head from the number of heads). Exclude such sites from the network, or {_WAY_OUT}"
    )


def _some(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the first names with their shapes, for a message."""
    return ", ".join(f"{name} {shapes[name]}" for name in names[:3])


def _compare(module: nn.Module, folder: str, example: Any) -> None:
    """Raise `PlasticError` unless the model in a folder gives the outputs of the module on the example inputs."""
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
