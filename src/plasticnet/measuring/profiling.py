"""Measures what a network costs when it runs: parameters, multiply-adds, memory and time, per module and in total."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from plasticnet.cost.latency import TIME
from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.measuring.memory import MemoryMode, storages_of
from plasticnet.measuring.timing import Inputs, call, called_rows, device_of, one_thread, times_of, watching
from plasticnet.tools.gradients import with_gradients_if_needed
from plasticnet.tools.inputs import batch_size, blaming_inputs, call_arguments, copy_inputs
from plasticnet.tools.snapshot import duplicate, left_as_it_was
from plasticnet.tools.table import format_table, readable_bytes
from plasticnet.tools.torch_private import storage_key
from plasticnet.tools.trees import tensors_within
from plasticnet.tracing.trace import trace
from plasticnet.units import is_skipped

PROFILE_COLUMNS = ("module", "parameters", "MACs", "peak memory", "ms")


@dataclass(frozen=True)
class ModuleProfile:
    """What one module of a network costs: a row of `Profile`.

    Every module with parameters that is called has a row. The parameters of modules in it that are never called
    themselves (such as ``out_proj`` in attention) belong to it. Memory and time are measured from the start of the
    module until the next module with a row starts, so that an activation or a pooling belongs to the layer before it.

    Attributes:
        name: The name of the module, which is empty for the model itself.
        sites: The names of the sites whose units the module produces; empty for a model without gates.
        parameters: How many parameters the module has.
        macs: The multiply-adds of these parameters, for one sample.
        peak_bytes: The most memory that the activations took at a time, those of earlier modules included.
        milliseconds: The time, for the whole batch.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> [(row.name, row.parameters, row.macs) for row in pn.profile(model, (torch.randn(3, 4),)).rows]
        [('0', 40, 32), ('2', 18, 16)]
    """

    name: str
    sites: tuple[str, ...]
    parameters: int
    macs: int
    peak_bytes: int
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """What `profile` returns: the cost of a network in total, and for each of its modules. It prints as a table.

    Attributes:
        parameters: How many parameters the network has.
        macs: The multiply-adds of the parameters, for one sample. Memory and time are those of the whole batch.
        peak_bytes: The most memory that the tensors of a forward pass in evaluation mode took at a time.
        milliseconds: The time of such a pass.
        kept_bytes: What a forward pass in training mode keeps for the backward pass, or None if it was not measured.
        training_milliseconds: The time of a forward and a backward pass, or None if it was not measured.
        batch: The batch size.
        device: "cpu", where time is the CPU time of one thread, or "cuda", where it is the time of the GPU.
        rows: The modules, in the order of execution.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = pn.profile(model, (torch.randn(3, 4),), repeats=1)
        >>> found.parameters, found.macs, found.batch, found.device
        (58, 48, 3, 'cpu')
        >>> found.training_milliseconds is None
        True
    """

    parameters: int
    macs: int
    peak_bytes: int
    milliseconds: float
    kept_bytes: int | None
    training_milliseconds: float | None
    batch: int
    device: str
    rows: tuple[ModuleProfile, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the profile as plain data, ready for JSON."""
        return {**asdict(self), "rows": [{**asdict(row), "sites": list(row.sites)} for row in self.rows]}

    def cells(self) -> list[tuple[str, ...]]:
        """Return a row of text for each module, with a cell for each of the `PROFILE_COLUMNS`."""
        return [
            (
                row.name or "(the model)",
                f"{row.parameters:,}",
                f"{row.macs:,}",
                readable_bytes(row.peak_bytes),
                f"{row.milliseconds:.3f}",
            )
            for row in self.rows
        ]

    def total(self) -> str:
        """Return a text about the whole network, which includes training if that was measured."""
        text = (
            f"{self.parameters:,} parameters, {self.macs:,} MACs for one sample; a forward pass of {self.batch} takes "
            f"{readable_bytes(self.peak_bytes)} for activations at its peak, and {self.milliseconds:.3f} ms "
            f"({TIME[self.device]})"
        )
        if self.kept_bytes is None:
            return text
        return (
            f"{text}. In training it keeps {readable_bytes(self.kept_bytes)} for the backward pass, and both "
            f"take {self.training_milliseconds:.3f} ms"
        )

    def __str__(self) -> str:
        return "\n".join([*format_table([PROFILE_COLUMNS, *self.cells()]), self.total()])


def profile(module: nn.Module, example_inputs: Any, *, repeats: int = 9, training: bool = False) -> Profile:
    """Measure what a network costs when it runs: parameters, multiply-adds, memory and time.

    The module may be a `PlasticNet`, a compact module, or any other. A copy of it is run. The module itself, its
    gradients and the random number generators are left as they were.

    A `PlasticNet` is measured as it is in memory now. Units that were cut are gone, units that are closed are still
    computed, and closed blocks are skipped. In evaluation mode the gates are at their mean, and memory includes the
    weights that they were multiplied into, which a compact module does not need. In training mode the gates are drawn.
    A single forward pass is measured there, while most estimators of the gates' gradient add another one.

    Memory is that of the tensors that operations return, until they are freed. It does not include parameters, buffers
    and inputs, nor what an operation allocates for itself. The times of the modules include the time that measuring
    takes, so that their sum is slightly larger than the total.

    Args:
        module: The module.
        example_inputs: A tuple of arguments, or a dict of keyword arguments, on which the module runs; the batch is the
            first axis.
        repeats: How many runs each time is the median of.
        training: Whether to measure also a forward and a backward pass in training mode.

    Raises:
        PlasticError: The module does not run on the inputs, or not in training mode although that is to be measured;
            it has nothing to train; it lies on a device other than the CPU and CUDA; or ``repeats`` is out of range.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = pn.profile(model, (torch.randn(3, 4),), training=True)
        >>> found.parameters, found.macs, [row.name for row in found.rows]
        (58, 48, ['0', '2'])
        >>> found.peak_bytes  # the outputs of the first layer and of ReLU, three rows of eight floats each
        192
    """
    if type(repeats) is not int or repeats < 1:
        raise PlasticError(f"repeats={repeats!r}: a whole number, 1 or more")
    return with_gradients_if_needed(lambda: _profiled(module, example_inputs, repeats, training))


def _profiled(module: nn.Module, example_inputs: Any, repeats: int, training: bool) -> Profile:
    """Return what `profile` does, for options that were checked."""
    args, kwargs = call_arguments(example_inputs)
    device = device_of(module, (args, kwargs))
    uses = module.uses if isinstance(module, GatedModel) else trace(module, example_inputs).uses
    twin = duplicate(module).eval()
    model = twin.model if isinstance(twin, GatedModel) else twin
    inputs = args, kwargs
    with left_as_it_was(twin), one_thread():
        with blaming_inputs(model, args, kwargs):
            watched, row_of = called_rows(twin, model, copy_inputs(inputs))
        given = copy_inputs(inputs)
        # With hooks a TransformerEncoder does not take its fused path, just as under gates and when it is compact.
        with watching(watched, (memory := MemoryMode()).start), memory:
            call(twin, given)
        total = times_of(partial(call, twin), inputs, {}, repeats, device)[None]
        times = times_of(partial(call, twin), inputs, watched, repeats, device)
        kept, trained = _training(twin.train(), inputs, repeats, device) if training else (None, None)
    parameters, macs = _sizes(twin, model, uses, row_of)
    sites = _sites(twin, row_of)
    rows = tuple(
        ModuleProfile(n, tuple(sites[n]), parameters[n], round(macs[n]), memory.peaks[n], times.get(n, 0.0))
        for n in watched
    )
    return Profile(
        sum(parameters.values()), round(sum(macs.values())), max(memory.peaks.values()), total,
        kept, trained, batch_size(args, kwargs), device, rows,
    )  # fmt: skip


def _sizes(
    twin: nn.Module, model: nn.Module, uses: Mapping[str, float], row_of: Mapping[str, str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the parameters and the multiply-adds of each row; those of closed blocks do not count as multiply-adds."""
    skipped = tuple(f"{block}." for block in _closed_blocks(twin))
    parameters: dict[str, int] = defaultdict(int)
    macs: dict[str, float] = defaultdict(float)
    for tensor, p in model.named_parameters():
        parameters[row_of[tensor]] += p.numel()
        macs[row_of[tensor]] += 0.0 if tensor.startswith(skipped) else p.numel() * uses.get(tensor, 0.0)
    return parameters, macs


def _closed_blocks(twin: nn.Module) -> list[str]:
    """Return the names of the gated blocks that are closed, and so are skipped when the network runs.

    Closed experts are none of them: in a dense mixture they are still computed, and in a sparse one others do their
    work.
    """
    sites = twin.sites.values() if isinstance(twin, GatedModel) else []
    blocks = [(s.units.blocks, s.open | (s.grace > 0)) for s in sites if is_skipped(s.units)]
    return [name for names, kept in blocks for name, stays in zip(names, kept, strict=True) if not stays]


def _sites(twin: nn.Module, row_of: Mapping[str, str]) -> dict[str, dict[str, None]]:
    """Return, for each row, the names of the sites whose units its parameters produce, in order."""
    tags: dict[str, dict[str, None]] = defaultdict(dict)
    for site in twin.sites.values() if isinstance(twin, GatedModel) else []:
        for s in site.units.slices:
            if not s.consumed and s.tensor in row_of:
                tags[row_of[s.tensor]][site.name] = None
    return tags


def _training(twin: nn.Module, inputs: Inputs, repeats: int, device: str) -> tuple[int, float]:
    """Return the bytes that a forward pass keeps, and the median milliseconds of a forward and a backward pass."""
    try:
        with torch.enable_grad():
            kept = _kept(twin, copy_inputs(inputs))
            return kept, times_of(partial(_step, twin), inputs, {}, repeats, device)[None]
    except PlasticError:
        raise
    except (ValueError, RuntimeError) as error:
        raise PlasticError(
            f"{type(twin).__name__} does not run in training mode on the example inputs: {error}. Pass inputs that "
            "it can train on (a batch of two or more, say), or training=False."
        ) from error


def _kept(twin: nn.Module, inputs: Inputs) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters, buffers and inputs."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        kept.update((storage_key(s), s) for s in storages_of([t]))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        outputs = call(twin, inputs)
    before = {storage_key(s) for s in storages_of([*twin.parameters(), *twin.buffers(), *tensors_within(inputs)])}
    del outputs
    return sum(s.nbytes() for key, s in kept.items() if key not in before)


def _step(twin: nn.Module, inputs: Inputs) -> None:
    """Run a forward and a backward pass, in which every entry of the outputs gets the gradient 1."""
    twin.zero_grad()
    outputs = [t for t in tensors_within(call(twin, inputs)) if t.requires_grad]
    if not outputs:
        raise PlasticError(f"no output of {type(twin).__name__} depends on a parameter that requires a gradient")
    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
