"""Reads the private names of FSDP2, ``torch.distributed.fsdp.fully_shard``, for what has no public name.

It is to FSDP2 what `torch_private` is to the rest of torch. FSDP2 keeps a record of every parameter that it shards. A
change of size changes these records, as a deferred initialisation does: they are made anew for the new shape without
values, and then take the sharded tensor that lies in the module.
"""

# pyright: reportPrivateUsage=false
# Reading private names is the purpose of this module and of `torch_private`, and of no other.

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# FSDP2 takes modules with this name in their registry to be replicated, and leaves their parameters whole.
_REPLICATE = "replicate"
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "__composable_api_state_key")  # of attributes it adds
_FSDP = "torch.distributed.fsdp._fully_shard"


def keep_whole(kind: type[nn.Module]) -> None:
    """Let FSDP2 leave modules of a class alone when it shards a module around them."""
    try:
        from torch.distributed._composable.contract import REGISTRY_KEY
    except ImportError:  # torch was built without torch.distributed
        return
    setattr(kind, REGISTRY_KEY, {_REPLICATE: None})


class ShardedParameter:
    """What FSDP2 knows of one parameter that it shards.

    Args:
        group: The parameters that it gathers together with this one.
        record: What it knows of this one.

    Attributes:
        places: The modules that hold the parameter, each with its name there.
        modules: The modules at whose forward it gathers the parameter.
    """

    def __init__(self, group: Any, record: Any) -> None:
        self._group, self._record = group, record
        info = record._module_info
        shared = zip(info.shared_modules, info.shared_param_names, strict=True)
        self.places: list[tuple[nn.Module, str]] = [(info.module, info.param_name), *shared]
        self.modules: tuple[nn.Module, ...] = tuple(group.modules)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as a DTensor, of which this process has a part."""
        return self._record.sharded_param

    @property
    def mesh(self) -> Any:
        """The mesh of the processes that share the parameter."""
        return self._group.mesh_info.mesh

    @property
    def dim(self) -> int:
        """The dimension along which it is sharded."""
        return self._record.fsdp_placement.dim

    @property
    def parallel(self) -> bool:
        """Whether the parameter was a DTensor before, as in tensor parallelism."""
        return bool(self._record.is_dtensor)

    def reshard(self) -> None:
        """Let the modules hold the sharded parameters of the group; after a forward they may hold gathered ones."""
        self._group.reshard()

    def take(self, new: nn.Parameter) -> None:
        """Let FSDP2 and the modules know another sharded parameter, perhaps of another shape, in the place of this one.

        Args:
            new: A DTensor on the same mesh, sharded along the same dimension.
        """
        record: Any = self._record
        placement = record.fsdp_placement
        whole = nn.Parameter(torch.empty(new.shape, dtype=new.dtype, device="meta"), new.requires_grad)
        options: dict[str, Any] = {"param": whole, "device": record.device, "shard_placement_fn": lambda _: placement}
        known = inspect.signature(record._init_sharded_param).parameters
        if "mesh_info" in known:
            options["mesh_info"] = record.mesh_info
        record._init_sharded_param(**options)
        if record.post_forward_mesh_info:
            record._init_sharded_post_forward_param_metadata(whole)
        record.all_gather_outputs = []
        vars(record).pop("_unsharded_param", None)
        record._setattr_on_modules(new)
        record.reset_sharded_param()
        record._init_extensions()

    def kept(self) -> Callable[[], None]:
        """Return what puts the record back to what it is now."""
        record, before = self._record, dict(vars(self._record))

        def restore() -> None:
            vars(record).clear()
            vars(record).update(before)

        return restore


def give_parts(parameter: nn.Parameter, new: Tensor) -> None:
    """Let a DTensor hold the parts of another one, of any shape, and no gradient; it stays the same object."""
    held, given = cast(Any, parameter), cast(Any, new)
    held.grad = None
    held.data = given.data
    held._local_tensor, held._spec = given._local_tensor, given._spec


def sharded_parameters(module: nn.Module) -> list[ShardedParameter]:
    """Return the parameters within a module that FSDP2 shards, also where it shards a module around this one."""
    states = _states()
    if not states:
        return []
    inside = {id(m) for m in module.modules()}
    found = []
    for state in states:
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                found += [ShardedParameter(group, r) for r in group.fsdp_params if id(r._module_info.module) in inside]
    return found


def flattened(module: nn.Module) -> bool:
    """Return whether `FullyShardedDataParallel` (FSDP1) has a module; FSDP2 marks modules alike."""
    held = [module, *module.children()]
    return any(vars(m).get(_MARKS[0]) or type(m).__name__ == "FullyShardedDataParallel" for m in held)


def gathers(module: nn.Module) -> bool:
    """Return whether FSDP2 gathers parameters at the forward of a module, or of one within it."""
    return any(_plain_class(m) is not type(m) for m in module.modules())


def _plain_class(module: nn.Module) -> type:
    """Return the class that a module had before FSDP2 gave it one of its own."""
    if _FSDP not in sys.modules:
        return type(module)
    from torch.distributed.fsdp import FSDPModule

    order = type(module).__mro__
    return order[order.index(FSDPModule) + 1] if FSDPModule in order else order[0]


def _states() -> list[Any]:
    """Return all that FSDP2 keeps of modules in this process, once each."""
    if _FSDP not in sys.modules:
        return []
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    found = [ref() for ref in list(_module_state_mapping.values())]
    return list({id(s): s for s in found if isinstance(s, FSDPState)}.values())


@contextmanager
def without_sharding(module: nn.Module, whole: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module be what it was before FSDP2 sharded it, within this context, with parameters that are whole.

    All processes must call this alike. What is copied within the context is plain. Parameters must not be replaced.

    Args:
        module: The module.
        whole: Gathers a sharded tensor.
    """
    found = sharded_parameters(module)
    for p in found:
        p.reshard()
    undo: list[Callable[[], None]] = []
    try:
        for p in found:
            old = p.parameter
            with torch.no_grad():
                new = nn.Parameter(whole(old), old.requires_grad)
            for holder, name in p.places:
                setattr(holder, name, new)
                undo.append(lambda holder=holder, name=name, old=old: setattr(holder, name, old))
        for m in module.modules():
            undo += _stripped(m)
        yield
    finally:
        for back in reversed(undo):
            back()


def _stripped(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Take from a module its hooks, its class and its marks of FSDP2, and yield what puts each of them back."""
    held = vars(module)
    for name, hooks in list(held.items()):
        if isinstance(hooks, dict) and name.endswith("_hooks"):
            gone = [key for key, hook in hooks.items() if _of_fsdp(hook)]
            related = [d for n, d in held.items() if isinstance(d, dict) and "hooks" in n] if gone else []
            for d in related:
                before = list(d.items())
                for key in gone:
                    d.pop(key, None)
                yield lambda d=d, before=before: (d.clear(), d.update(before))[0]
    kind = type(module)
    if (plain := _plain_class(module)) is not kind:
        module.__class__ = plain
        yield lambda: setattr(module, "__class__", kind)
    for n in [n for n in held if n.startswith(_MARKS)]:
        value = held.pop(n)
        yield lambda n=n, value=value: held.update({n: value})


def _of_fsdp(thing: Any) -> bool:
    """Return whether a hook, or what a module keeps, belongs to FSDP2."""
    thing = getattr(thing, "hook", thing)
    named = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
    return str(getattr(named, "__module__", "")).startswith(_FSDP)
