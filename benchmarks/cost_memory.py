"""Memory that the gates take beyond the model: what PlasticNet keeps, and how much higher a step's peak is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from cost_models import LENET, RESNET, Network
from cost_steps import BATCH, K, gated, gated_step, plain_step
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from plasticnet import PlasticNet


def memory(_: int) -> list[dict[str, Any]]:
    """A row for each network, in bytes. Nothing random enters: once is enough."""
    rows = []
    for network in (LENET, RESNET):
        net, optimizer = gated(network, network.widths, network.widths)
        net.k = K
        peaks = {
            "plain": peak(plain_step(network, network.widths)),
            "stage 2": peak(gated_step(net, optimizer, network)),
        }
        logits = [s.phi for s in net.sites.values()]
        consumer, largest = largest_input(net, network)
        rows.append(
            {
                "network": network.name,
                "parameters": sum(p.nbytes for p in net.model.parameters()),
                "consumer": consumer,
                "largest_input": largest,
                "kept": kept(net) + sum(p.grad.nbytes for p in logits if p.grad is not None),
                "optimizer": sum(t.nbytes for p in logits for t in optimizer.state[p].values()),
                "peak": peaks,
            }
        )
        print(rows[-1], flush=True)
    return rows


def peak(step: Callable[[], None]) -> int:
    """The most that is allocated during a step beyond what was at its beginning, as the allocator reports
    it to the profiler: the scratch memory inside of operations counts, Python objects do not."""
    step()
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()  # the profiler sees the end of those blocks only whose beginning it has seen
        with record_function("measured step"):
            step()
    events = sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(i for i, e in enumerate(events) if e.name() == "measured step")
    changes = [e.nbytes() if e.name() == "[memory]" else 0 for e in events[begin:]]
    return int(np.cumsum(changes).max())


def kept(net: PlasticNet) -> int:
    """Bytes of every tensor and array that the network holds between two steps, and the model does not."""
    known = {id(o) for m in net.model.modules() for o in (m, *m._parameters.values(), *m._buffers.values())}
    sizes: dict[int, int] = {}
    waiting: list[Any] = [vars(net)]
    while waiting:
        thing = waiting.pop()
        if id(thing) in known:
            continue
        known.add(id(thing))
        if isinstance(thing, Tensor):
            sizes[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            whole = thing if thing.base is None or not isinstance(thing.base, np.ndarray) else thing.base
            sizes[whole.ctypes.data] = whole.nbytes
        else:
            waiting += _inside(thing)
    return sum(sizes.values())


def _inside(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, nn.Module) or type(thing).__module__.startswith("plasticnet"):
        yield from vars(thing).values()


@torch.no_grad()
def largest_input(net: PlasticNet, network: Network) -> tuple[str, int]:
    """The layer that reads gated units and has the largest input, and the bytes of that."""
    sizes: dict[str, int] = {}
    handles = [
        net.get_submodule(f"model.{name}").register_forward_pre_hook(
            lambda _, args, name=name: sizes.__setitem__(name, args[0].nbytes)
        )
        for name in {c.module for s in net.sites.values() for c in s.units.consumers}
    ]
    net.model(network.data(BATCH)[0])
    for handle in handles:
        handle.remove()
    return max(sizes.items(), key=lambda item: (item[1], item[0]))
