"""Saves and loads compact modules: their tensors, and a recipe for the shape of the original architecture.

No pickle is involved. A file can hold tensors, and JSON that is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.files.container import FORMAT, mapping_in, read_file, stored, write_file
from plasticnet.files.disk import AnyPath, path_of
from plasticnet.layers.attention import free_heads, head_size, unfuse_encoders
from plasticnet.layers.experts import remove_expert
from plasticnet.layers.record import RECORD
from plasticnet.layers.skip import remove_block
from plasticnet.layers.sparse import sparse_layers
from plasticnet.layers.take import Take, insert_take
from plasticnet.net import PlasticNet
from plasticnet.surgery.attributes import WIDTHS, group_size, mismatches, weights_of
from plasticnet.surgery.rewrite import replace_tensors
from plasticnet.tools.feature_info import feature_widths, with_feature_widths
from plasticnet.tools.gradients import outside_inference_mode
from plasticnet.tools.torch_private import Conv, ConvTranspose, made_of_tensors, unsaved_buffers


def save(module: nn.Module, path: AnyPath) -> None:
    """Write a compact module, or any other plain module, so that `load` can build it again.

    The file holds the tensors, and what a module of the original architecture needs to take this shape. Equal modules
    give equal bytes. The file appears whole or not at all. Where the module was changed in another way after the cut,
    such as by folding each BatchNorm into its convolution, the factory for `load` must do the same.

    Args:
        module: A plain module, such as `PlasticNet.compact` returns.
        path: The file, which is replaced if it exists; it is in the safetensors format, so that the name may not end
            as those of ``torch.save`` do (.pt, .pth, .ckpt).

    Raises:
        PlasticError: The module is a `PlasticNet` or holds one, has layers that `sparsify` made or weights
            that were quantised, or cannot be written; or the name of the file is one for ``torch.save``.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(build(), (torch.randn(3, 4),))
        >>> net.resize({"0": [0, 1, 5]})  # keeps three of the eight units
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn.save(net.compact(), f"{folder}/small.safetensors")
        ...     again = pn.load(f"{folder}/small.safetensors", build)
        >>> again[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    path = path_of(path)
    if Path(path).suffix in (".pt", ".pth", ".ckpt"):
        raise PlasticError(
            f"{path}: save writes safetensors, which torch.load does not read: call it "
            f"{Path(path).with_suffix('.safetensors')}, or write the module by torch.save"
        )
    if any(isinstance(child, PlasticNet) for child in module.modules()):
        raise PlasticError("save takes a plain module: net.compact(); to go on training, use save_checkpoint")
    if sparse := sparse_layers(module):
        raise PlasticError(f"{sparse[0]!r} is sparse; save what was given to sparsify, and sparsify what load gives")
    for name, tensor in _tensors(module).items():
        if made_of_tensors(tensor) and not tensor.is_nested:
            raise PlasticError(
                f"{name} is a {type(tensor).__name__}, and not a plain tensor; save the module before it is quantised, "
                "and quantise what load gives"
            )
    record: dict[str, Any] = getattr(module, RECORD, {})
    attributes: dict[str, dict[str, Any]] = {}
    takes: dict[str, int] = {}
    for name, child in module.named_modules():
        if isinstance(child, Take):
            takes[name.rpartition(".")[0]] = child.axis
        own = [a for a in WIDTHS if a in child.__dict__] + [a for m, a in record.get("widths", []) if m == name]
        widths = {a: _plain(child.__dict__[a]) for a in own if _is_width(child.__dict__.get(a))}
        if widths:
            attributes[name] = widths
    recipe = {"format": FORMAT, "kind": "module", "attributes": attributes, "takes": takes}
    recipe.update((key, record[key]) for key in ("resized", "removed", "experts") if key in record)
    if "resized" in record:
        recipe["resized"] = [*record["resized"], *_new_biases(module, record["resized"])]
    write_file(path, {n: stored(t, n) for n, t in _tensors(module).items()}, recipe)


@outside_inference_mode()
def load(path: AnyPath, factory: Callable[[], nn.Module]) -> nn.Module:
    """Build the module that `save` wrote into a file.

    Nothing in the file is run. Widths, tensors and removed blocks are set as the file says, and everything else must
    be as the factory builds it.

    Args:
        path: The file.
        factory: A function without arguments that builds the original architecture. Sites that were cut or grown may
            have any width in it.

    Returns:
        The module, in evaluation mode. Its tensors lie on the device on which the factory puts them.

    Raises:
        PlasticError: The file cannot be read, is damaged, or is not one of ours; it belongs to another architecture,
            and the message names a tensor and the shapes; or ``factory`` does not build a module.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> small = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn.save(small, f"{folder}/small.safetensors")
        ...     again = pn.load(f"{folder}/small.safetensors", build)
        >>> torch.equal(again(x), small(x))
        True
    """
    path = path_of(path)
    tensors, recipe = read_file(path, "module")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise PlasticError(f"load takes a factory, such as {type(factory).__name__} itself, not what it returns")
    model = factory()
    if not isinstance(model, nn.Module):
        raise PlasticError(f"the factory returned a {type(model).__name__}, not an nn.Module")
    model.eval()  # this comes first, because in training mode spectral_norm changes when its weight is read
    lost = {key: recipe.get(key, []) for key in ("removed", "experts")}
    _remove(path, model, **lost)
    takes = mapping_in(path, recipe, "takes")
    for name, axis in takes.items():
        indices = tensors.get(f"{name}.0.indices")
        sound = (
            indices is not None and indices.dim() == 1 and indices.dtype == torch.int64 and bool((indices >= 0).all())
        )
        if type(axis) is not int or not -8 <= axis < 0 or indices is None or not sound:
            raise PlasticError(f"{path}: damaged (the features taken before {name!r})")
        _submodule(path, model, name)
        insert_take(model, name, Take(indices, axis))
    groups = {name: group_size(module) for name, module in model.named_modules()}
    weights = weights_of(model, _tensors(model))
    heads = {name: size for name, module in model.named_modules() if (size := head_size(module)) is not None}
    for name, widths in mapping_in(path, recipe, "attributes").items():
        _set_widths(path, _submodule(path, model, name), name, widths)
    resized = recipe.get("resized")
    dims = None if resized is None else _dimensions(path, resized)
    if resized is not None:
        widths = [[name, a] for name, own in recipe["attributes"].items() for a in own if a not in WIDTHS]
        gone = {key: names for key, names in lost.items() if names or key == "removed"}
        setattr(model, RECORD, {"resized": resized, "widths": widths, **gone})
    _set_tensors(path, model, tensors, dims)
    for name, size in heads.items():
        free_heads(model.get_submodule(name), size)
    unfuse_encoders(model)
    for name, module in model.named_modules():
        for what in mismatches(module, groups.get(name), weights.get(name), _unread(name, module, dims)):
            raise PlasticError(f"{path} belongs to another architecture, or is damaged: {name}: {what}")
    for name in takes:
        take, layer = model.get_submodule(f"{name}.0"), model.get_submodule(f"{name}.1")
        width = getattr(layer, "in_features", getattr(layer, "in_channels", None))
        if isinstance(take, Take) and width not in (None, len(take.indices)):
            raise PlasticError(
                f"{path}: damaged ({len(take.indices)} features are taken before {name!r}, {width} are read)"
            )
    return model


def _dimensions(path: str, resized: Any) -> set[tuple[str, int]]:
    """Return which dimensions of which tensors a file says were resized.

    Args:
        path: The file, for messages.
        resized: What the file says: a list of pairs of a tensor's name and a dimension, if it is sound.

    Raises:
        PlasticError: It is something else.
    """
    if not isinstance(resized, list) or not all(
        isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and type(p[1]) is int for p in resized
    ):
        raise PlasticError(f"{path}: damaged (which dimensions were resized)")
    return {(name, dim) for name, dim in resized}


def _unread(name: str, module: nn.Module, resized: Set[tuple[str, int]] | None) -> list[str]:
    """Return the names of the vectors of a module that the cut has left as they were; others must fit its weight.

    The model does not read such a vector, as where it multiplies with the weight of a linear layer and leaves out its
    bias. That a file has it as the factory does was checked as it was loaded.

    Args:
        name: The name of the module.
        module: The module.
        resized: Pairs of a tensor's name and a dimension, in which the cut has resized it; None if that is not known.
    """
    prefix = f"{name}." if name else ""
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [leaf for leaf, t in held if resized is not None and t.dim() == 1 and (prefix + leaf, 0) not in resized]


def _new_biases(module: nn.Module, resized: list[list[Any]]) -> list[list[Any]]:
    """Return the biases that layers have got since they were cut, as from a BatchNorm folded into them.

    They are as long as the outputs of the layer, so that a file may resize them with it. A bias of another length is
    one that the model does not read.

    Args:
        module: The compact module.
        resized: Pairs of a tensor's name and a dimension, in which the cut has resized it.
    """
    found = list[list[Any]]()
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        outputs = 1 if isinstance(layer, ConvTranspose) else 0
        new = [f"{prefix}bias", 0] not in resized and [f"{prefix}weight", outputs] in resized
        if (
            new
            and isinstance(layer, nn.Linear | Conv)
            and layer.bias is not None
            and len(layer.bias) == layer.weight.shape[outputs]
        ):
            found.append([f"{prefix}bias", 0])
    return found


def _is_number(value: Any) -> bool:
    """Return whether a value is a whole number from 1 on."""
    return type(value) is int and value >= 1


def _is_width(value: Any) -> bool:
    """Return whether a value can be a width: a whole number from 1 on, or a tuple or list that holds some.

    Its other entries, as the -1 of a shape, are no widths: a file does not hold them, and they stay as they are.
    """
    value = _listed(value)
    return any(map(_is_number, value if type(value) in (tuple, list) else [value]))


def _listed(value: Any) -> Any:
    """Return the numbers of channels in the ``feature_info`` of timm as a list, and any other value as it is."""
    features = feature_widths(value)
    return value if features is None else features


def _plain(value: Any) -> Any:
    """Return a width as JSON data, with null for the entries that are no widths."""
    return value if isinstance(value, int) else [v if _is_number(v) else None for v in _listed(value)]


def _merged(old: Any, value: Any) -> Any:
    """Return a width of a file as the module holds it, with the module's own entries where the file has null.

    Args:
        old: What the module has: a number, or a tuple or list.
        value: What the file has: a number, or a list of the same length.
    """
    if isinstance(old, int):
        return value
    merged = [o if v is None else v for o, v in zip(_listed(old), value, strict=True)]
    return type(old)(merged) if feature_widths(old) is None else with_feature_widths(old, merged)


def _fits(old: Any, value: Any) -> bool:
    """Return whether a width of a file can take the place of what the module has."""
    old = _listed(old)
    if not (_is_width(old) and _is_width(value)) or isinstance(old, int) != isinstance(value, int):
        return False
    pairs = [(old, value)] if isinstance(old, int) else list(zip(old, value, strict=False))
    same = isinstance(old, int) or len(old) == len(value)
    return same and all(_is_number(v) if _is_number(o) else v is None for o, v in pairs)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, those included that a state dict leaves out."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def _remove(path: AnyPath, model: nn.Module, removed: Any, experts: Any) -> None:
    """Remove blocks and experts from a model, whose names a file gives.

    Raises:
        PlasticError: The file is damaged, or belongs to another architecture.
    """
    for names in (removed, experts):
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise PlasticError(f"{path}: damaged (which blocks or experts were removed)")
    for name in removed:
        _submodule(path, model, name)
        remove_block(model, name)
    for name in experts:
        _submodule(path, model, name)
        if not isinstance(_submodule(path, model, name.rpartition(".")[0]), nn.ModuleList | nn.ModuleDict):
            raise PlasticError(f"{path} belongs to another architecture: {name!r} is no module of a list or a dict")
        remove_expert(model, name)


def _submodule(path: Any, model: nn.Module, name: str) -> nn.Module:
    """Return a module of the model by name. Raises `PlasticError` where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlasticError(f"{path} belongs to another architecture: {type(model).__name__} has no {name!r}") from None


def _set_widths(path: Any, module: nn.Module, name: str, widths: Any) -> None:
    """Set the widths of a module.

    Args:
        path: The file, for messages.
        module: The module.
        name: Its name, for messages.
        widths: What the file says: a dict of attributes and values, if it is sound.

    Raises:
        PlasticError: A file may not set such an attribute; or the old and the new value are neither both numbers, nor
            both lists of the same length.
    """
    if not isinstance(widths, dict):
        raise PlasticError(f"{path}: damaged (the widths of {name!r})")
    for attribute, value in widths.items():
        old = module.__dict__.get(attribute)
        # Of the attributes of torch's own layers a file may set only the widths, and not the strides, for example.
        allowed = attribute in WIDTHS or not (attribute.startswith("_") or type(module).__module__.startswith("torch."))
        if not (allowed and _fits(old, value)):
            raise PlasticError(f"{path}: may not set {name}.{attribute} from {old!r} to {value!r}")
        setattr(module, attribute, _merged(old, value))


def _set_tensors(
    path: Any, model: nn.Module, tensors: Mapping[str, Tensor], resized: Set[tuple[str, int]] | None
) -> None:
    """Replace every parameter and buffer of a model by that of the file.

    Args:
        path: The file, for messages.
        model: The model, built by the factory and with the blocks and attributes of the file.
        tensors: The tensors of the file, by name.
        resized: Pairs of a tensor's name and a dimension, which may have another length in the file than in the model;
            None if all dimensions may.

    Raises:
        PlasticError: The names, the types or the shapes do not fit.
    """
    own = _tensors(model)
    extra, missing = sorted(tensors.keys() - own.keys())[:5], sorted(own.keys() - tensors.keys())[:5]
    if extra or missing:
        found = [f"only the {what} has {names}" for what, names in (("file", extra), ("model", missing)) if names]
        raise PlasticError(
            f"{path} belongs to another architecture than {type(model).__name__}: {', and '.join(found)}"
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    derived = {f"{prefix}.{leaf}".lstrip(".") for prefix, m in model.named_modules() for leaf in unsaved_buffers(m)}
    for name, old in own.items():
        new = tensors[name].to(old.device)
        if new.dtype.is_floating_point != old.dtype.is_floating_point or new.dtype.is_complex != old.dtype.is_complex:
            raise PlasticError(f"{path}: {name} is {new.dtype} in the file, {old.dtype} in {type(model).__name__}")
        # A buffer that is no part of the state dict may be computed as the model runs, so its shape may be any.
        free = None if name in derived else resized
        fixed = [d for d in range(old.dim()) if free is not None and (name, d) not in free]
        if new.dim() != old.dim() or any(new.shape[d] != old.shape[d] for d in fixed):
            raise PlasticError(
                f"{path} belongs to another architecture: {name} has shape {tuple(new.shape)} in the file, "
                f"{tuple(old.shape)} in {type(model).__name__}"
            )
        pairs.append((old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new))
    replace_tensors(model, pairs)
