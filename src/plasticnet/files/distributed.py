"""Saves a training run from several processes, and loads it into as many or another number of them.

Torch's distributed checkpoint (DCP) writes a folder, to which every process adds the parts that it holds. This module
decides what goes there, and brings the network to the sizes in the folder before DCP reads into it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from plasticnet.errors import PlasticError
from plasticnet.files.checkpoints import decode, encode
from plasticnet.net import PlasticNet
from plasticnet.surgery.loading import fit
from plasticnet.surgery.optimizers import Optimizers, listed
from plasticnet.tools.sharding import held_parameters
from plasticnet.tools.torch_private import inside_ddp


class Stateful(Protocol):
    """What has a state, such as a `Schedule`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Restore the state."""
        ...


def save_distributed(
    folder: str | os.PathLike[str],
    module: nn.Module,
    optimizer: Optimizers = None,
    schedule: Stateful | None = None,
    extra: Any = None,
) -> None:
    """Write a training run to a folder by torch's distributed checkpoint; every process writes what it holds.

    All processes must call it alike. Without `torch.distributed` a single process writes all. The states of the random
    number generators of each process are saved, too. A checkpoint that is in the folder stays until the new one is
    whole, also where processes are killed, so there must be room for both.

    Args:
        folder: The folder, which all processes see.
        module: The network, or a module that holds it, as it is, sharded by ``fully_shard`` or in a
            `DistributedDataParallel`.
        optimizer: The optimizer, or all optimizers, of its parameters.
        schedule: The schedule, or something else with ``state_dict`` and ``load_state_dict``.
        extra: Anything else that `save_checkpoint` can write; that of rank 0 is saved.

    Raises:
        PlasticError: An optimizer holds a parameter that the module does not have, ``extra`` or the folder cannot be
            written, or another process has failed.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> def built():
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        ...     net = pn.PlasticNet(model, (torch.randn(2, 4),))
        ...     return net, torch.optim.Adam(net.param_groups(lr=0.01))
        >>> net, optimizer = built()
        >>> net.resize({"0": [0, 1, 5]}, optimizer)
        >>> other, its_optimizer = built()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn.save_distributed(folder, net, optimizer, extra={"epoch": 3})
        ...     pn.load_distributed(folder, other, its_optimizer)
        {'epoch': 3}
        >>> len(other.sites["0"]), torch.equal(other.model[0].weight, net.model[0].weight)
        (3, True)
    """
    module = inside_ddp(module)
    names = {id(p): n for n, p in held_parameters(module).items()}
    tensors, rest = _of_module(module)
    groups = []
    for i, o in enumerate(listed(optimizer)):
        found, described = _of_optimizer(o, names, i)
        tensors |= found
        groups.append(described)
    common = {
        "rest": rest,
        "optimizers": groups,
        "schedule": None if schedule is None else schedule.state_dict(),
        "extra": extra,
        "ranks": _ranks(),
    }
    own = {"schedule": common["schedule"]}  # which has collected something in this process since the last epoch ended
    tensors |= _written("", common) | _written(f"own.{_rank()}.", own)
    tensors |= {f"random.{_rank()}.{kind}": state for kind, state in _random().items()}
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    from plasticnet.files.parts import PartsWriter

    writer = PartsWriter(os.fspath(folder))
    # What all processes hold is that of rank 0, as in training. By default any of them writes it, and the statistics of
    # a norm would be those of another one.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        with _quiet():
            save(tensors, storage_writer=writer, planner=planner, no_dist=not _together())
    except CheckpointException as error:  # which is no Exception
        what = "; ".join(f"rank {rank}: {wrapped[0]!r}" for rank, wrapped in error.failures.items())
        raise PlasticError(
            f"{folder}: the checkpoint cannot be written ({what}); an older one is still there"
        ) from error


def load_distributed(
    folder: str | os.PathLike[str],
    module: nn.Module,
    optimizer: Optimizers = None,
    schedule: Stateful | None = None,
) -> Any:
    """Load what `save_distributed` wrote, into as many processes as have written it or into another number of them.

    All processes must call it alike. The network is resized to the sizes in the folder, and its parameters stay the
    same objects. Where as many processes load as have saved, their random numbers go on, too. The folder is one of
    torch's, which holds a pickle of names and shapes: load only what you trust.

    Args:
        folder: The folder.
        module: The network, or a module that holds it, built as the one that was saved. It may be sharded by
            ``fully_shard`` or not, whatever the one was that was saved.
        optimizer: The optimizer, or all optimizers, of its parameters, as they were saved.
        schedule: The schedule that was saved.

    Returns:
        The ``extra`` that was saved.

    Raises:
        PlasticError: The folder cannot be read, or does not fit the module, the optimizers or the schedule.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> def built():
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        ...     return pn.PlasticNet(model, (torch.randn(2, 4),))
        >>> net, other = built(), built()
        >>> net.resize({"0": [2, 3]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pn.save_distributed(folder, net, extra="the best so far")
        ...     pn.load_distributed(folder, other)
        'the best so far'
        >>> len(other.sites["0"])
        2
    """
    module, optimizers = inside_ddp(module), listed(optimizer)
    saved = _Saved(folder)
    names = {id(p): n for n, p in held_parameters(module).items()}
    tree = saved.tree()
    # An older file, and one of another number of processes, has the schedule of a single process.
    mine = f"own.{_rank()}."
    own = saved.tree(mine) if tree["ranks"] == _ranks() and f"{mine}tree" in saved.entries else tree
    _check(tree, optimizers, schedule, names)
    _check_module(module, saved)
    for prefix, net in _networks(module).items():
        fit(net, saved.network(f"module.{prefix}"))
    target, _ = _of_module(module)
    held = {names[id(p)]: p for o in optimizers for g in o.param_groups for p in g["params"]}
    described = tree["optimizers"] if optimizers else []  # without any, only the module is loaded
    states = [_State(each, held, saved, i) for i, each in enumerate(described)]
    random = saved.empty(f"random.{_rank()}.") if tree["ranks"] == _ranks() else {}
    saved.read(target | random | {k: t for state in states for k, t in state.tensors.items()})
    found = {k.removeprefix("module."): t for k, t in target.items()}
    module.load_state_dict(found | tree["rest"])
    for o, state in zip(optimizers, states, strict=True):
        state.put(o)
    if schedule is not None:
        schedule.load_state_dict(own["schedule"])
    _go_on({k.rpartition(".")[2]: t for k, t in random.items()})
    return tree["extra"]


class _Saved:
    """A folder that `save_distributed` wrote.

    Args:
        folder: The folder.

    Raises:
        PlasticError: It cannot be read, or something else wrote it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        self.folder = os.fspath(folder)
        try:
            found = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        except Exception as error:
            raise PlasticError(f"{self.folder}: no distributed checkpoint can be read here ({error})") from error
        self.entries: Mapping[str, Any] = found
        if "tree" not in found:
            raise PlasticError(f"{self.folder}: save_distributed has not written this checkpoint")

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Read into tensors, by the names of their entries; all processes must call it alike."""
        from torch.distributed.checkpoint.state_dict_loader import load

        with _quiet():
            load(dict(tensors), checkpoint_id=self.folder, no_dist=not _together())

    def empty(self, prefix: str, device: str = "cpu") -> dict[str, Tensor]:
        """Return a tensor without values for each entry whose name begins with a prefix."""
        found = {k: m for k, m in self.entries.items() if k.startswith(prefix)}
        return {k: torch.empty(m.size, dtype=m.properties.dtype, device=device) for k, m in found.items()}

    def tree(self, prefix: str = "") -> dict[str, Any]:
        """Return what was saved beside the large tensors by `_written`."""
        found = self.empty(f"{prefix}tree") | self.empty(f"{prefix}small.")
        self.read(found)
        text = found.pop(f"{prefix}tree").numpy().tobytes()
        return decode(json.loads(text), {k.removeprefix(f"{prefix}small."): t for k, t in found.items()})

    def network(self, prefix: str) -> dict[str, Tensor]:
        """Return the state of a network, in which only the tensors of its gates have values."""
        gates = self.empty(f"{prefix}gates.")
        self.read(gates)
        return {k.removeprefix(prefix): gates.get(k, t) for k, t in self.empty(prefix, "meta").items()}


class _State:
    """The state of one optimizer that is loaded.

    Args:
        described: What `_of_optimizer` has said of it.
        held: The parameters by name, resized.
        saved: The folder.
        i: The number of the optimizer.

    Attributes:
        tensors: The tensors to read into, by the names of their entries.
    """

    def __init__(self, described: Mapping[str, Any], held: Mapping[str, nn.Parameter], saved: _Saved, i: int) -> None:
        self._groups: list[dict[str, Any]] = described["groups"]
        self._states: dict[nn.Parameter, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, (keys, values) in described["state"].items():
            state = self._states[held[name]] = dict(values)
            for key in keys:
                entry = f"optimizer.{i}.{name}.{key}"
                dtype = saved.entries[entry].properties.dtype
                self.tensors[entry] = state[key] = torch.zeros_like(held[name].detach(), dtype=dtype)

    def put(self, optimizer: Optimizer) -> None:
        """Give an optimizer this state, and the options of its groups."""
        optimizer.state.clear()
        for parameter, state in self._states.items():
            optimizer.state[parameter] = state
        for group, was in zip(optimizer.param_groups, self._groups, strict=True):
            group.update({key: value for key, value in was.items() if key != "params"})


def _written(prefix: str, tree: Any) -> dict[str, Tensor]:
    """Return nested data as tensors, by names that begin with a prefix."""
    small: dict[str, Tensor] = {}
    text = json.dumps(encode(tree, small)).encode()
    named = {f"{prefix}small.{key}": t for key, t in small.items()}
    return {f"{prefix}tree": torch.frombuffer(bytearray(text), dtype=torch.uint8), **named}


def _of_module(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors in the state of a module, by the names of their entries, and what else is in it."""
    state = module.state_dict()
    tensors = {f"module.{k}": t for k, t in state.items() if isinstance(t, Tensor)}
    return tensors, {k: v for k, v in state.items() if not isinstance(v, Tensor)}


def _of_optimizer(optimizer: Optimizer, names: Mapping[int, str], i: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimizer: the tensors that have the shape of a parameter, and everything else.

    Args:
        optimizer: The optimizer.
        names: The names of the parameters, by their ids.
        i: The number of the optimizer.
    """
    _check_names(optimizer, names)
    tensors: dict[str, Tensor] = {}
    states: dict[str, Any] = {}
    for p, state in optimizer.state.items():
        name = names[id(p)]
        large = [k for k, v in state.items() if isinstance(v, Tensor) and v.dim() and v.shape == p.shape]
        tensors |= {f"optimizer.{i}.{name}.{key}": state[key] for key in large}
        states[name] = [large, {key: value for key, value in state.items() if key not in large}]
    groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    return tensors, {"groups": groups, "state": states}


def _check_names(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Raise `PlasticError` if an optimizer holds a parameter without a name."""
    if any(id(p) not in names for g in optimizer.param_groups for p in g["params"]):
        raise PlasticError(
            f"{type(optimizer).__name__} holds a parameter that the module does not have: pass the module that holds "
            "all of its parameters, and build the optimizer after fully_shard"
        )


def _check(
    tree: Mapping[str, Any], optimizers: Sequence[Optimizer], schedule: Stateful | None, names: Mapping[int, str]
) -> None:
    """Raise `PlasticError` unless a checkpoint has the states of these optimizers, and of the schedule."""
    for o in optimizers:
        _check_names(o, names)
    now = [[[names[id(p)] for p in g["params"]] for g in o.param_groups] for o in optimizers]
    then = [[g["params"] for g in described["groups"]] for described in tree["optimizers"]]
    if optimizers and now != then:
        raise PlasticError(
            "the optimizers do not hold the parameters, in the same groups, that those of the checkpoint held; build "
            "them as before, from net.param_groups(), and pass all of them"
        )
    if schedule is not None and tree["schedule"] is None:
        raise PlasticError("the checkpoint has no schedule: it was saved without schedule=")


def _check_module(module: nn.Module, saved: _Saved) -> None:
    """Raise `PlasticError` unless a checkpoint has the tensors that a module has, networks apart."""
    inside = tuple(f"module.{prefix}" for prefix in _networks(module))
    own, _ = _of_module(module)
    for name in {*own, *(k for k in saved.entries if k.startswith("module."))}:
        if name.startswith(inside):
            continue
        now, then = own.get(name), saved.entries.get(name)
        if now is None or then is None or now.shape != then.size:
            raise PlasticError(
                f"the checkpoint belongs to another module: {name.removeprefix('module.')} is "
                f"{'missing' if then is None else tuple(then.size)} there, and "
                f"{'missing' if now is None else tuple(now.shape)} here"
            )


def _networks(module: nn.Module) -> dict[str, PlasticNet]:
    """Return the networks within a module, by what the names of their entries begin with."""
    found = {name: m for name, m in module.named_modules() if isinstance(m, PlasticNet)}
    return {f"{name}." if name else "": m for name, m in found.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from warning within this context of a single process or an older checkpoint, as there may be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        yield


def _together() -> bool:
    """Return whether this is one of several processes that know each other."""
    return dist.is_available() and dist.is_initialized()


def _ranks() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _together() else 1


def _rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if _together() else 0


def _random() -> dict[str, Tensor]:
    """Return the states of the random number generators of this process."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else states


def _go_on(states: Mapping[str, Tensor]) -> None:
    """Put the random number generators of this process into the states that `_random` returned."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
