"""What torch has no public name for. All reads of its private names go through this module.

So there is one place to look at when a new version of torch changes something.
"""

# pyright: reportPrivateUsage=false
# (The only module with this line: reading private names is what it is for.)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils import parametrize
from torch.utils import checkpoint

# -- base classes of layers -------------------------------------------------------------------

BatchNorm = nn.modules.batchnorm._BatchNorm
BatchOrInstanceNorm = nn.modules.batchnorm._NormBase
Conv = nn.modules.conv._ConvNd
ConvTranspose = nn.modules.conv._ConvTransposeNd
Dropout = nn.modules.dropout._DropoutNd


# -- what a module holds ----------------------------------------------------------------------


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module holds itself, by name: the dict in which it keeps them. (Attributes will not do:
    that of a parametrized weight is computed when it is read, and only a parameter can be assigned.)"""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that a module holds itself, by name: the dict in which it keeps them."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module holds itself, by name: the dict in which it keeps them. (``named_children`` names one
    that it holds twice once.)"""
    return module._modules


def has_child(module: nn.Module, name: str) -> bool:
    """Whether a module holds another of this name itself; False before its ``__init__`` has run."""
    return name in module.__dict__.get("_modules", {})


def unsaved_buffers(module: nn.Module) -> set[str]:
    """The names of the buffers that a module holds itself and leaves out of its state dict."""
    return module._non_persistent_buffers_set


def convert(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Apply a function to all parameters and buffers, in place, as ``Module.to`` does; returns the module."""
    return module._apply(function)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, in place or by ``torch.compile``."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def ignored_by_ddp(module: nn.Module) -> Sequence[str]:
    """The names of the parameters and buffers that `DistributedDataParallel` was told to ignore in a module."""
    return getattr(module, "_ddp_params_and_buffers_to_ignore", ())


# -- recurrent layers -------------------------------------------------------------------------


def flat_names(module: nn.RNNBase) -> list[str]:
    """The names of a recurrent layer's weights, in the order in which it reads them."""
    return module._flat_weights_names


def flat_weights(module: nn.RNNBase) -> list[Any]:
    """The list that a recurrent layer reads its weights from: a second one beside its parameters."""
    return module._flat_weights


def set_flat_weights(module: nn.RNNBase, weights: list[Any]) -> None:
    """Let a recurrent layer read its weights from this list."""
    module._flat_weights = weights


# -- attention --------------------------------------------------------------------------------


def unfuse_attention(module: nn.MultiheadAttention) -> None:
    """Keep `nn.TransformerEncoderLayer` from its own fused forward, which takes every head to be of the usual size."""
    module._qkv_same_embed_dim = False


# -- tensors ----------------------------------------------------------------------------------

# Whether a tensor lives within a transformation of torch.func, such as vmap.
is_transformed = is_functorch_wrapped_tensor


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of, or None."""
    return tensor._base


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that tells living storages apart: two objects may stand for the same one."""
    return storage._cdata


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The indices and the values of a sparse tensor (COO), which need not be coalesced."""
    return tensor._indices(), tensor._values()


# -- operations -------------------------------------------------------------------------------


def schema_name(op: Any) -> str:
    """``aten::add`` for ``torch.ops.aten.add.Tensor``, and for ``torch.ops.aten.add`` of all its overloads."""
    return op._schema.name if isinstance(op, torch._ops.OpOverload) else op._qualified_op_name


def schema_arguments(op: torch._ops.OpOverload) -> Sequence[Any]:
    """The declared arguments of an operation, each with its name and type."""
    return op._schema.arguments


# -- what torch keeps, or calls ---------------------------------------------------------------


def forget_parametrized() -> None:
    """Empty the cache of computed weights that ``torch.nn.utils.parametrize.cached`` fills."""
    parametrize._cache.clear()


# What torch.utils.checkpoint.checkpoint calls, in one version of torch or another.
_CHECKPOINTING = ("_checkpoint_impl", "CheckpointFunction", "_checkpoint_without_reentrant_generator")


@contextmanager
def checkpointing_by(replacement: Any) -> Iterator[None]:
    """Within this context gradient checkpointing calls ``replacement``, or its ``apply``, instead of torch's own
    functions."""
    names = [n for n in _CHECKPOINTING if hasattr(checkpoint, n)]
    kept = [getattr(checkpoint, name) for name in names]
    for name in names:
        setattr(checkpoint, name, replacement)
    try:
        yield
    finally:
        for name, own in zip(names, kept, strict=True):
            setattr(checkpoint, name, own)
