"""Decides which modules of a network are watched, and measures how long each of them takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.tools.inputs import copy_inputs
from plasticnet.tools.torch_private import is_scripted
from plasticnet.tools.trees import tensors_within
from plasticnet.units import owner

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


def device_of(module: nn.Module, inputs: Any) -> str:
    """Return the kind of device that a module and its inputs lie on.

    Returns:
        "cuda" if any tensor lies there, else "cpu".

    Raises:
        PlasticError: A tensor lies on another kind of device, on which time is not measured, or on the meta device.
    """
    tensors = [*module.parameters(), *module.buffers(), *tensors_within(inputs)]
    devices = {t.device.type for t in tensors}
    if "meta" in devices:
        raise PlasticError(
            f"{type(module).__name__} cannot be profiled on the meta device, where nothing is computed; "
            "build it, and its inputs, on the CPU or on CUDA"
        )
    if unknown := devices - {"cpu", "cuda"}:
        raise PlasticError(
            f"time is measured on the CPU and on CUDA, not on {', '.join(sorted(unknown))}; move it there"
        )
    return "cuda" if "cuda" in devices else "cpu"


def call(module: nn.Module, inputs: Inputs) -> Any:
    """Run a module on positional and keyword arguments."""
    args, kwargs = inputs
    return module(*args, **kwargs)


@contextmanager
def watching(modules: Mapping[str, nn.Module], on_start: Callable[[str], Any]) -> Iterator[None]:
    """Within this context, ``on_start`` is called with the name of a module whenever that module starts.

    Args:
        modules: The modules to watch, by name.
        on_start: Called with a name; what it returns is ignored.
    """

    def hook(name: str, *_: Any) -> None:
        on_start(name)

    handles = [m.register_forward_pre_hook(partial(hook, name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def called_rows(twin: nn.Module, model: nn.Module, inputs: Inputs) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the modules that get a row in a table of costs, and the row to which each parameter belongs.

    A parameter belongs to the row of the innermost module around it that is called when the network runs. (Some modules
    are never called themselves, such as ``out_proj`` in attention.) A module gets a row if parameters belong to it.

    Args:
        twin: What is run once: the model, or a network with gates around it.
        model: The model.
        inputs: What the twin is run on.

    Returns:
        The modules by name, in the order of their first call, and the name of the row of each parameter. The name of
        the model itself is empty.
    """
    modules = {name: m for name, m in model.named_modules() if not is_scripted(m)}  # those take no hooks
    called: dict[str, None] = {"": None}
    with watching(modules, called.setdefault):
        call(twin, inputs)
    row_of: dict[str, str] = {}
    for tensor, _ in model.named_parameters():
        name = owner(tensor)
        while name not in called:
            name = name.rpartition(".")[0]
        row_of[tensor] = name
    return {name: modules[name] for name in called if name in row_of.values()}, row_of


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this context PyTorch computes on one thread.

    Threads that wait for each other keep their processors busy, and CPU time would count this.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def stamp(device: str) -> Any:
    """Return the present time: CPU nanoseconds of this thread, or on "cuda" an event that the GPU will record."""
    if device == "cpu":
        return time.thread_time_ns()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Return the milliseconds between two results of `stamp`."""
    return (end - start) / 1e6 if isinstance(start, int) else start.elapsed_time(end)


def times_of(
    run: Callable[[Inputs], Any], inputs: Inputs, watched: Mapping[str, nn.Module], repeats: int, device: str
) -> dict[str | None, float]:
    """Measure how long each of some modules takes when the network runs.

    Args:
        run: Runs the network on a copy of the inputs.
        inputs: The inputs.
        watched: The modules to measure, by name.
        repeats: How often the network is run.
        device: "cpu" or "cuda".

    Returns:
        For each module that starts, the median of the milliseconds from its start until another watched module starts,
        or the run ends; several calls in one run are added up. The value at None is the time before the first module
        starts, which is the time of the whole run where nothing is watched.
    """
    marks: list[tuple[str | None, Any]] = []
    laps: dict[str | None, list[float]] = defaultdict(list)
    with watching(watched, lambda name: marks.append((name, stamp(device)))):
        for _ in range(repeats):
            given = copy_inputs(inputs)
            marks[:] = [(None, stamp(device))]
            run(given)
            marks.append((None, stamp(device)))
            if device == "cuda":
                torch.cuda.synchronize()
            lap: dict[str | None, float] = defaultdict(float)
            for (name, start), (_, end) in pairwise(marks):
                lap[name] += _between(start, end)
            for name, milliseconds in lap.items():
                laps[name].append(milliseconds)
    return {name: median(values) for name, values in laps.items()}
