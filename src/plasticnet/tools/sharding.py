"""Tensors and models of which every process holds a part, as FSDP2 (``torch.distributed.fsdp.fully_shard``) makes them.

A sharded tensor is a DTensor. It has the shape of the whole, and its values are spread over the processes of a mesh.
What reads or writes its values gathers it, one tensor at a time. All processes must do so alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.tools.fsdp_private import ShardedParameter, flattened, sharded_parameters, without_sharding
from plasticnet.tools.torch_private import parameters_of


def is_sharded(t: object) -> bool:
    """Return whether something is a DTensor, of which every process may hold a part only."""
    return dist.is_available() and isinstance(t, Tensor) and type(t) is not Tensor and hasattr(t, "device_mesh")


def gathered(t: Tensor) -> Tensor:
    """Return a tensor with all of its values: a DTensor is gathered, and any other is returned as it is."""
    return cast(Any, t.detach()).full_tensor() if is_sharded(t) else t


def distributed(new: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, of which all processes have all values, sharded as another one is; it may have another shape."""
    if not is_sharded(like):
        return new
    from torch.distributed.tensor import distribute_tensor

    held: Any = like
    new = new.detach().to(held.to_local().device)
    found = distribute_tensor(new, held.device_mesh, held.placements, src_data_rank=None)
    local = found.to_local()
    if local.untyped_storage().nbytes() > local.numel() * local.element_size():  # a view would keep the whole alive
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local.clone(), held.device_mesh, held.placements, run_check=False, shape=new.shape, stride=new.stride()
        )
    return found


def refuse_foreign(module: nn.Module) -> None:
    """Raise `PlasticError` if a parameter of a module is a DTensor that FSDP2 has not made."""
    known = {id(p.parameter) for p in sharded_parameters(module)}
    for name, p in module.named_parameters():
        if is_sharded(p) and id(p) not in known:
            raise PlasticError(
                f"{name} is a DTensor that fully_shard has not made, as in tensor parallelism, whose parts cannot "
                "follow a change of size; FSDP2 (fully_shard with a 1D mesh) and DistributedDataParallel work"
            )


def checked_mesh(module: nn.Module) -> Any:
    """Return the mesh over which FSDP2 shards a model, or None where it does not.

    Raises:
        PlasticError: FSDP2 shards the parameters in a way that cannot follow a change of size.
    """
    found = sharded_parameters(module)
    if not found and flattened(module):
        raise PlasticError(
            "FullyShardedDataParallel (FSDP1) makes one flat tensor of many parameters, whose sizes cannot change; use "
            "fully_shard (FSDP2) or DistributedDataParallel"
        )
    if not found:
        return None
    meshes = {id(p.mesh): p.mesh for p in found}
    first = next(iter(meshes.values()))
    if len(meshes) > 1 and any(m != first for m in meshes.values()):
        raise PlasticError(
            "fully_shard was called with several meshes within one network; its gates are the same on all processes, "
            "so that one mesh is needed for all parameters"
        )
    if any(p.parallel for p in found):
        raise PlasticError(
            "fully_shard was called on parameters that were DTensors already, as in tensor parallelism, whose parts "
            "cannot follow a change of size; fully_shard alone, or DistributedDataParallel, works"
        )
    if first.ndim != 1:
        raise PlasticError(
            f"fully_shard was called with a mesh of {first.ndim} dimensions (HSDP), which plasticnet does not know; "
            "use a 1D mesh of all processes, or DistributedDataParallel"
        )
    return first


def held_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module, by name, as optimizers hold them: what FSDP2 has gathered is sharded again."""
    for p in sharded_parameters(module):
        p.reshard()
    return dict(module.named_parameters())


def left_whole(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module, by name, that FSDP2 does not shard, whether it has gathered others or not."""
    held = {(id(m), leaf) for p in sharded_parameters(module) for m, leaf in p.places}
    found: dict[str, nn.Parameter] = {}
    for prefix, m in module.named_modules():
        for leaf, p in parameters_of(m).items():
            if p is not None and (id(m), leaf) not in held:
                found[f"{prefix}.{leaf}" if prefix else leaf] = p
    return found


class Shards:
    """The parameters of a model that FSDP2 shards, brought back to their parts, so that they can be replaced.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_foreign(model)
        checked_mesh(model)
        found = sharded_parameters(model)
        for p in found:
            p.reshard()
        self._of: dict[int, ShardedParameter] = {id(p.parameter): p for p in found}

    def check(self, name: str, old: Tensor, shape: Mapping[int, int]) -> None:
        """Raise `PlasticError` if a parameter cannot have other lengths along some dimensions.

        Args:
            name: Its name, for the message.
            old: The parameter.
            shape: The new lengths, by dimension.
        """
        p = self._of.get(id(old))
        if p is None or p.dim == 0 or p.dim not in shape:
            return
        if shape[p.dim] % p.mesh.size():
            raise PlasticError(
                f"{name} is sharded along dimension {p.dim} (shard_placement_fn), whose length would become "
                f"{shape[p.dim]}; FSDP2 needs a multiple of {p.mesh.size()} there: shard along dimension 0, or use "
                "multiple_of"
            )

    def take(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Let FSDP2 know the second tensor of each pair in the place of the first, where it shards the first."""
        for old, new in pairs:
            p = self._of.get(id(old))
            if p is not None and old is not new:
                assert isinstance(new, nn.Parameter)
                p.take(new)

    def kept(self) -> Callable[[], None]:
        """Return what lets FSDP2 know again what it knows now."""
        undo = [p.kept() for p in self._of.values()]

        def restore() -> None:
            for back in undo:
                back()

        return restore


@contextmanager
def as_whole(model: nn.Module) -> Iterator[None]:
    """Let a model be plain and whole within this context, as before FSDP2 sharded it: to run it, or to copy it.

    All processes must call this alike, and each of them needs memory for all parameters. They must not be replaced.
    Without FSDP2 nothing is done.
    """
    refuse_foreign(model)
    if checked_mesh(model) is None:
        yield
        return
    with without_sharding(model, gathered):
        yield


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise `PlasticError` if a model is sharded.

    Args:
        model: The model.
        what: What cannot be done then, as the beginning of a sentence.
    """
    if any(is_sharded(p) for p in model.parameters()) or sharded_parameters(model):
        raise PlasticError(
            f"{what} needs all parameters in one process, and fully_shard has left a part in each: do it before "
            "fully_shard, or with the plain module that net.compact() returns"
        )
