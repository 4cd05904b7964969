"""Integers on modules that repeat a width, and must follow when it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import nn

_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
# Attributes that a recipe may set: each names a width or a number of groups.
WIDTHS = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_channels",
    "num_groups",
    "num_parameters",
    "embedding_dim",
)


_NORM_WIDTHS = ("num_features", "num_channels")


def update_attributes(model: nn.Module, takes: Mapping[tuple[str, int], np.ndarray], groups: Mapping[str, int]) -> None:
    """Bring the attributes of every module whose parameters were resized up to date.

    ``groups`` maps the weights of grouped convolutions to the rows of one group: a convolution of
    one group looks like an ordinary one.
    """
    for tensor, rows in groups.items():
        owner, _, leaf = tensor.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, _CONV):
            module.groups = module.get_parameter(leaf).shape[0] // rows
    owners = {tensor.rpartition(".")[0] for tensor, _ in takes}
    for owner in owners:
        module = model.get_submodule(owner)
        for name, value in _expected(module):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, value)


def _expected(module: nn.Module) -> Iterator[tuple[str, int]]:
    """What the widths of a module should be, judging by its parameters."""
    shape = next((t.shape for t in (*module._parameters.values(), *module._buffers.values()) if t is not None), None)
    if shape is None or len(shape) == 0:
        return
    if isinstance(module, nn.Linear):
        yield from (("out_features", shape[0]), ("in_features", shape[1]))
    elif isinstance(module, nn.Bilinear):
        yield "out_features", shape[0]
    elif isinstance(module, _CONV):
        other = shape[1] * module.groups
        first, second = (
            ("in_channels", "out_channels") if isinstance(module, _TRANSPOSED) else ("out_channels", "in_channels")
        )
        yield from ((first, shape[0]), (second, other))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        yield "num_features", shape[0]
    elif isinstance(module, nn.GroupNorm):
        yield from (("num_groups", module.num_groups * shape[0] // module.num_channels), ("num_channels", shape[0]))
    elif isinstance(module, nn.PReLU):
        yield "num_parameters", shape[0]
    elif isinstance(module, nn.Embedding):
        yield "embedding_dim", shape[1]


def group_size(module: nn.Module) -> int | None:
    """Channels of one group, which no resize changes; None where there are no groups."""
    if isinstance(module, _CONV) and module.groups > 1:
        return module.weight.shape[0] // module.groups
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // max(module.num_groups, 1)
    return None


def mismatches(module: nn.Module, group: int | None) -> Iterator[str]:
    """Where a module's attributes contradict the shapes of its parameters, or its ``group_size``."""
    outputs = next((v for n, v in _expected(module) if n in ("out_features", "out_channels", *_NORM_WIDTHS)), None)
    for leaf in ("bias", "running_mean", "running_var"):
        vector = getattr(module, leaf, None)
        if outputs is not None and vector is not None and vector.shape != (outputs,):
            yield f"{leaf} has shape {tuple(vector.shape)}, for {outputs} outputs"
    if isinstance(module, _CONV):
        expected = module.weight.shape[0] // group if group else 1
        if module.groups != expected:
            yield f"groups is {module.groups}, but its parameters say {expected}"
    if isinstance(module, nn.GroupNorm) and group and module.num_groups * group != module.num_channels:
        yield f"num_groups is {module.num_groups}, but groups have {group} of {module.num_channels} channels"
    for name, value in _expected(module):
        if getattr(module, name, value) != value:
            yield f"{name} is {getattr(module, name)}, but its parameters say {value}"
    if isinstance(module, _CONV) and tuple(module.weight.shape[2:]) != tuple(module.kernel_size):
        yield f"the kernel is {tuple(module.kernel_size)}, but weight has shape {tuple(module.weight.shape)}"
