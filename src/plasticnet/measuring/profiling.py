"""What a network costs when it runs: parameters, multiply-adds, memory and time, per module and in total."""

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
from plasticnet.tools.inputs import batch_size, blaming_inputs, call_arguments, copy_inputs
from plasticnet.tools.snapshot import duplicate, left_as_it_was
from plasticnet.tools.table import format_table, readable_bytes
from plasticnet.tools.torch_private import storage_key
from plasticnet.tools.trees import tensors_within
from plasticnet.tracing.trace import trace
from plasticnet.units import BlockUnits

PROFILE_COLUMNS = ("module", "parameters", "MACs", "peak memory", "ms")


@dataclass(frozen=True)
class ModuleProfile:
    """One module with parameters, and those of the modules in it that are never called by themselves (as
    ``out_proj`` in attention). Memory and time are taken from its start until the next such module starts,
    so that an activation or a pooling counts for the layer before it.

    ``sites`` are those whose units the module produces; a plain module has none."""

    name: str
    sites: tuple[str, ...]
    parameters: int
    macs: int
    peak_bytes: int
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """What `profile` measured: in total, and in ``rows``, one per module in the order of execution.

    ``macs`` are multiply-adds with parameters for one sample; everything else is for a ``batch``.
    ``peak_bytes`` is the most memory that tensors made by a forward pass in evaluation took at a time, and
    ``milliseconds`` the time of such a pass. For training ``kept_bytes`` is what a forward pass keeps for the
    backward pass, and ``training_milliseconds`` the time of both; None if that was not asked for.
    ``device`` is "cpu", where time is the CPU time of one thread, or "cuda", where it is that of the GPU."""

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
        """Plain data, ready for JSON."""
        return {**asdict(self), "rows": [{**asdict(row), "sites": list(row.sites)} for row in self.rows]}

    def cells(self) -> list[tuple[str, ...]]:
        """The table of the modules, under `PROFILE_COLUMNS`."""
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
        """Two sentences about the whole."""
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
    """Measure a network, or any module (a compact one, say), on example inputs: a tuple of arguments or a dict.

    A copy is run, ``repeats`` times for each median of times; the module, its gradients and the random number
    generators are left alone. ``training`` measures a backward pass, too.

    Of a `PlasticNet` the network as it now lies in memory is measured: units that were cut are gone, units that
    are closed are still computed, and closed blocks are skipped. In evaluation the gates are at their mean; the
    weights that they are multiplied into are memory that a compact module does without. In training the gates
    are drawn. One forward and one backward pass are measured: most estimators add another forward pass.

    Memory is that of the tensors that operations return, followed until they are freed. Parameters, buffers and
    inputs do not count, and neither does what an operation allocates inside of itself. The time of the modules
    includes that of taking it, so that it sums up to slightly more than the total.

    Raises `PlasticError` when the module does not run on the inputs (in training mode, if asked for), has nothing
    to train, or lies on a device other than the CPU and CUDA (the meta device computes nothing).
    """
    if type(repeats) is not int or repeats < 1:
        raise PlasticError(f"repeats={repeats!r}: a whole number, 1 or more")
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
        # With hooks a TransformerEncoder takes its plain path, as it does under gates and when it is compact.
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
    """Parameters and multiply-adds of each row."""
    skipped = tuple(f"{block}." for block in _closed_blocks(twin))
    parameters: dict[str, int] = defaultdict(int)
    macs: dict[str, float] = defaultdict(float)
    for tensor, p in model.named_parameters():
        parameters[row_of[tensor]] += p.numel()
        macs[row_of[tensor]] += 0.0 if tensor.startswith(skipped) else p.numel() * uses.get(tensor, 0.0)
    return parameters, macs


def _closed_blocks(twin: nn.Module) -> list[str]:
    sites = twin.sites.values() if isinstance(twin, GatedModel) else []
    blocks = [(s.units.blocks, s.open | (s.grace > 0)) for s in sites if isinstance(s.units, BlockUnits)]
    return [name for names, kept in blocks for name, stays in zip(names, kept, strict=True) if not stays]


def _sites(twin: nn.Module, row_of: Mapping[str, str]) -> dict[str, dict[str, None]]:
    """The sites whose units the parameters of each row produce."""
    tags: dict[str, dict[str, None]] = defaultdict(dict)
    for site in twin.sites.values() if isinstance(twin, GatedModel) else []:
        for s in site.units.slices:
            if not s.consumed and s.tensor in row_of:
                tags[row_of[s.tensor]][site.name] = None
    return tags


def _training(twin: nn.Module, inputs: Inputs, repeats: int, device: str) -> tuple[int, float]:
    """What a forward pass keeps, in bytes, and the median milliseconds of forward and backward."""
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
    twin.zero_grad()
    outputs = [t for t in tensors_within(call(twin, inputs)) if t.requires_grad]
    if not outputs:
        raise PlasticError(f"no output of {type(twin).__name__} depends on a parameter that requires a gradient")
    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
