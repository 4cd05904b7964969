"""Reads the private names of torch, for everything that has no public name.

No other module reads them, apart from `fsdp_private` for FSDP2, so there is one place to look at when a new version of
torch changes something.
"""

# pyright: reportPrivateUsage=false
# Only this module and `fsdp_private` have the line above, because reading private names is their purpose.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils import checkpoint
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# -- base classes of layers -------------------------------------------------------------------

BatchNorm = nn.modules.batchnorm._BatchNorm
BatchOrInstanceNorm = nn.modules.batchnorm._NormBase
Conv = nn.modules.conv._ConvNd
ConvTranspose = nn.modules.conv._ConvTransposeNd
Dropout = nn.modules.dropout._DropoutNd


# -- what a processor can do -------------------------------------------------------------------


def has_half_products(dtype: torch.dtype) -> bool:
    """Return whether the CPU has fast products of matrices of a type of half precision."""
    name = "_is_mkldnn_fp16_supported" if dtype == torch.float16 else "_is_mkldnn_bf16_supported"
    known = getattr(torch.ops.mkldnn, name, None)
    return known is None or bool(known())


# -- what a module holds ----------------------------------------------------------------------


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dict in which a module keeps its own parameters, by name.

    Attributes would not do: the attribute of a parametrized weight is computed when it is read, and can only be
    assigned a parameter.
    """
    return _Scripted(module._parameters) if is_scripted(module) else module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module keeps its own buffers, by name."""
    return _Scripted(module._buffers) if is_scripted(module) else module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dict in which a module keeps its own submodules, by name.

    ``named_children`` would not do, because it names a module that is held twice only once.
    """
    return _Scripted(module._modules) if is_scripted(module) else module._modules


class _Scripted(dict[str, Any]):
    """What a module that TorchScript has compiled keeps in the place of a dict: it has few of a dict's methods.

    Args:
        kept: What it keeps.
    """

    def __init__(self, kept: Any) -> None:
        super().__init__(kept.items())
        self._kept = kept

    def __setitem__(self, key: str, value: Any) -> None:
        self._kept[key] = value
        super().__setitem__(key, value)


def has_child(module: nn.Module, name: str) -> bool:
    """Return whether a module holds a submodule of this name; before its ``__init__`` has run it holds none."""
    return name in module.__dict__.get("_modules", {})


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that it leaves out of its state dict."""
    return module._non_persistent_buffers_set


def convert(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Apply a function to all parameters and buffers in place, as ``Module.to`` does, and return the module."""
    with buffers_stay_shared(module):
        return module._apply(function)


@contextmanager
def buffers_stay_shared(module: nn.Module) -> Iterator[None]:
    """Keep a buffer that modules share one tensor while all buffers are converted; torch makes a tensor for each."""
    stores = [m._buffers for m in module.modules() if not is_scripted(m)]
    held = [(store, key, b) for store in stores for key, b in store.items() if b is not None]
    try:
        yield
    finally:
        first: dict[int, Tensor | None] = {}
        for store, key, before in held:
            store[key] = first.setdefault(id(before), store[key])


def is_scripted(module: nn.Module) -> bool:
    """Return whether TorchScript has compiled a module, by ``torch.jit.script`` or ``torch.jit.trace``."""
    return isinstance(module, torch.jit.ScriptModule)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled, in place or by ``torch.compile``."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def cannot_be_compiled(error: Exception) -> bool:
    """Return whether an error says that the compiler cannot follow a function, or will not compile it once more."""
    from torch._dynamo import exc  # It takes over a second, so it is imported only where something was compiled.

    followed = (exc.BackendCompilerFailed, exc.InvalidBackend)
    limit = getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException)
    return isinstance(error, (exc.TorchDynamoException, limit)) and not isinstance(error, followed)


def ignored_by_ddp(module: nn.Module) -> Sequence[str]:
    """Return the names of a module's parameters and buffers that `DistributedDataParallel` was told to ignore."""
    return getattr(module, "_ddp_params_and_buffers_to_ignore", ())


# -- several processes ------------------------------------------------------------------------


def running_ddp() -> nn.Module | None:
    """Return the `DistributedDataParallel` whose forward is running, the innermost one, or None."""
    return DistributedDataParallel._active_ddp_module if dist.is_available() else None


def inside_ddp(module: nn.Module) -> nn.Module:
    """Return what a `DistributedDataParallel` wraps, or the module itself."""
    return cast(nn.Module, module.module) if isinstance(module, DistributedDataParallel) else module


def process_group(ddp: nn.Module) -> Any:
    """Return the process group of a `DistributedDataParallel`."""
    return cast(Any, ddp).process_group


def watched_by_ddp(ddp: nn.Module) -> set[int]:
    """Return the ids of the parameters whose gradients a `DistributedDataParallel` averages."""
    return {id(p) for p in cast(Any, ddp)._module_parameters if p.requires_grad}


def unwatched(ddp: nn.Module) -> list[str]:
    """Return the names of the trainable parameters that a `DistributedDataParallel` holds, ought to watch, and does
    not: they came after it was built."""
    watched, ignored = watched_by_ddp(ddp), cast(Any, ddp).parameters_to_ignore
    named = cast(Any, ddp).module.named_parameters()
    return [n for n, p in named if p.requires_grad and n not in ignored and id(p) not in watched]


def give_shape(parameter: nn.Parameter, new: Tensor) -> None:
    """Let a parameter hold other data, of any shape, and no gradient.

    What accumulates the gradients of a parameter remembers its shape, and lives on in graphs and in a
    `DistributedDataParallel`. Autograd makes another one when the type of the data changes, so it does for a moment.
    """
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = new.data


def watch_again(ddp: nn.Module) -> None:
    """Let a `DistributedDataParallel` watch the parameters that its module has now, as if it were built anew.

    All ranks must call this alike. Communication hooks stay.
    """
    inside: Any = ddp
    inside._module_parameters = [
        p for name, p in inside.module.named_parameters() if name not in inside.parameters_to_ignore
    ]
    parameters, sparse = inside._build_params_for_reducer()
    names = inside._build_debug_param_to_name_mapping(parameters)
    hooks, inside._comm_hooks = list(inside._comm_hooks), []
    # The old reducer goes first: it keeps alive what accumulates gradients, and with it the shapes that were.
    inside.reducer = inside.logger = None
    inside._ddp_init_helper(parameters, sparse, names, inside.static_graph)
    for hook, state in hooks:
        inside.register_comm_hook(state, hook)


# -- recurrent layers -------------------------------------------------------------------------


def flat_names(module: nn.RNNBase) -> list[str]:
    """Return the names of a recurrent layer's weights, in the order in which it reads them."""
    return module._flat_weights_names


def flat_weights(module: nn.RNNBase) -> list[Any]:
    """Return the list from which a recurrent layer reads its weights, which it keeps beside its parameters."""
    return module._flat_weights


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything is called before or after a module, forwards or backwards."""
    kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(kinds)


def set_flat_weights(module: nn.RNNBase, weights: list[Any]) -> None:
    """Let a recurrent layer read its weights from this list."""
    module._flat_weights = weights


# -- attention --------------------------------------------------------------------------------


def unfuse_attention(module: nn.MultiheadAttention) -> None:
    """Keep `nn.TransformerEncoderLayer` from its fused forward, which computes the size of a head as width / heads."""
    module._qkv_same_embed_dim = False


# -- tensors ----------------------------------------------------------------------------------

# This function says whether a tensor lives within a transformation of torch.func, such as vmap.
is_transformed = is_functorch_wrapped_tensor


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that this one is a view of, or None."""
    return tensor._base


def differentiates_now() -> bool:
    """Return whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def after_backward(function: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that this thread runs, after what others do at its end."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(function))


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that tells storages apart while they exist; several objects may stand for the same storage."""
    return storage._cdata


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices and the values of a sparse tensor (COO), which need not be coalesced."""
    return tensor._indices(), tensor._values()


def made_of_tensors(tensor: Tensor) -> bool:
    """Return whether a tensor has no memory of its own but holds other tensors, as the int8 weights of torchao do."""
    return is_traceable_wrapper_subclass(tensor)


# -- operations -------------------------------------------------------------------------------


def schema_name(op: Any) -> str:
    """Return the name of an operation without its overload: ``aten::add`` for ``torch.ops.aten.add.Tensor``."""
    return op._schema.name if isinstance(op, torch._ops.OpOverload) else op._qualified_op_name


def schema_arguments(op: torch._ops.OpOverload) -> Sequence[Any]:
    """Return the declared arguments of an operation, each with its name and type."""
    return op._schema.arguments


def writes_silently(op: torch._ops.OpOverload) -> bool:
    """Return whether an operation writes to an argument that it does not return."""
    written = sum(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
    returned = sum(r.alias_info is not None and r.alias_info.is_write for r in op._schema.returns)
    return written > returned


def written_arguments(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a call to which the operation writes."""
    if not op._schema.is_mutable:
        return []
    bound = bound_arguments(op, args, kwargs)
    given = [bound[a.name] for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for t in given if isinstance(t, Tensor)]


def bound_arguments(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of an operation by their names, with the defaults of those that were not given."""
    given = dict(zip((a.name for a in schema_arguments(op)), args, strict=False)) | dict(kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema_arguments(op)}


# -- what torch keeps, or calls ---------------------------------------------------------------


def forget_parametrized() -> None:
    """Empty the cache of computed weights that ``torch.nn.utils.parametrize.cached`` fills."""
    parametrize._cache.clear()


# These functions of torch.utils.checkpoint, in different versions of torch, take what runs again as their first
# argument.
_RUN_AGAIN = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")


def ways_of_checkpointing(
    wrapped: Callable[[Callable[..., Any]], Callable[..., Any]], before_reentrant: Callable[[], None]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a function that changes what gradient checkpointing does, and one that puts everything back.

    Each may be called several times in a row.

    Args:
        wrapped: Returns what is run again in the backward pass, from the function that torch would run.
        before_reentrant: Called before a reentrant checkpoint; it may raise.
    """
    kept: dict[str, Any] = {name: getattr(checkpoint, name) for name in _RUN_AGAIN if hasattr(checkpoint, name)}
    reentrant = checkpoint.CheckpointFunction

    def wrapping(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda function, *args, **kwargs: own(wrapped(function), *args, **kwargs)

    def apply(*args: Any, **kwargs: Any) -> Any:
        before_reentrant()
        return reentrant.apply(*args, **kwargs)

    replaced: dict[str, Any] = {name: wrapping(own) for name, own in kept.items()}
    replaced["CheckpointFunction"], kept["CheckpointFunction"] = SimpleNamespace(apply=apply), reentrant
    return lambda: checkpoint.__dict__.update(replaced), lambda: checkpoint.__dict__.update(kept)
