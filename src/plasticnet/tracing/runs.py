"""Runs copies of a model in every known way: on all inputs, in both modes, and with random parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plasticnet.errors import PlasticError
from plasticnet.tools.drawn import variation
from plasticnet.tools.gradients import wants_gradients
from plasticnet.tools.inputs import Call, blaming_inputs, is_large
from plasticnet.tools.snapshot import duplicate
from plasticnet.tools.torch_private import buffers_of
from plasticnet.tracing.facts import Facts
from plasticnet.tracing.mode import Tracer
from plasticnet.tracing.operations import Operations
from plasticnet.tracing.state import Kept, follow

# How often a model in which values steer is run with random parameters to reach the modules that did not run: in all,
# and in a row without reaching a new one.
_TRIES, _FRUITLESS = 48, 12


@dataclass
class Runs:
    """What the runs of a model have found.

    Attributes:
        facts: What tracing has learned.
        calls: The calls that ran and that the self-check compares.
        evaluated: The parameters and buffers that were used in evaluation.
        refused: Why the model runs on none of the inputs in training mode, or None where it does.
    """

    facts: Facts = field(default_factory=Facts)
    calls: list[Call] = field(default_factory=list)
    evaluated: set[str] = field(default_factory=set)
    refused: str | None = None


def observe(model: nn.Module, tracer: Callable[..., Tracer], calls: Sequence[Call], both: bool = False) -> Runs:
    """Run copies of a model under a tracer.

    Training mode is traced because layers that run only there (auxiliary heads) join units, too. A model that does not
    run in it is traced in evaluation only.

    Args:
        model: The model.
        tracer: Makes a tracer from a model and the facts.
        calls: The calls in evaluation mode; the first one must succeed, and every other in one mode at least.
        both: Whether the self-check compares all calls in training mode, too, and not only those that use other
            parameters or run other operations there.

    Raises:
        PlasticError: The model rejects a set of inputs.
    """
    if is_large(model):
        with suppress(Exception):  # not every model runs on meta tensors, which have no values
            found = _observe(_on_meta(model), tracer, [_inputs_by(call, _to_meta) for call in calls], calls, both)
            if found.refused is None:
                return found
    return _observe(model, tracer, calls, calls, both)


def _observe(
    model: nn.Module, tracer: Callable[..., Tracer], calls: Sequence[Call], given: Sequence[Call], both: bool
) -> Runs:
    """Run a model; ``given`` are the same calls with the tensors that the caller gave."""
    runs = Runs()
    failed: dict[int, Exception] = {}
    evaluated: dict[int, Operations] = {}
    for i, call in enumerate(calls):
        try:
            evaluated[i] = _run(model, tracer, runs.facts, call)
            runs.calls.append(given[i])
        except Exception as error:  # a model can raise anything
            failed[i] = error
            if i == 0:
                break
    runs.evaluated = set(runs.facts.seen)
    trained = 0
    for i, call in enumerate(calls if 0 not in failed else []):
        try:
            times, ran = _run_training(model, tracer, runs.facts, replace(call, training=True))
        except Exception as error:
            if wants_gradients(error) or isinstance(error, PlasticError):
                raise  # All runs are then repeated with gradients, or the caller's `outputs` does not fit.
            runs.refused = runs.refused or f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            trained += 1
            failed.pop(i, None)
            more = both or any(name in runs.facts.seen - runs.evaluated for name, _ in model.named_parameters())
            if i > 0 or more or not ran.same_as(evaluated[i], numbers=times == 1):
                runs.calls.append(replace(_doubled(given[i]) if times == 2 else given[i], training=True))
    for i, error in failed.items():
        which = "the example inputs" if i == 0 else f"more_inputs[{i - 1}]"
        with blaming_inputs(model, given[i].args, given[i].kwargs, which):
            raise error
    runs.refused = None if trained else runs.refused
    _reach(model, tracer, runs.facts, calls)
    return runs


def _run(model: nn.Module, tracer: Callable[..., Tracer], facts: Facts, call: Call) -> Operations:
    """Trace one run of a copy of a model, and a second one where the model keeps something from call to call.

    A parameter is multiplied as often as in the first run in evaluation that used it.

    Returns:
        The operations of the first run.
    """
    twin = duplicate(model).train(call.training)  # on a copy, because a merged LoRA changes its parameters here
    running = tracer(twin, facts=facts, count=not call.training)
    before = Kept(twin)
    counted, facts.uses = facts.uses, {}
    try:
        running.run(call)
        operations = running.operations
        counted = {**facts.uses, **counted}
        follow(running, before, call)
    finally:
        facts.uses = counted
    return operations


def _run_training(model: nn.Module, tracer: Callable[..., Tracer], facts: Facts, call: Call) -> tuple[int, Operations]:
    """Trace a run in training mode, and return how often its batch was repeated for it, and its operations.

    BatchNorm refuses statistics over a single sample. So where the run fails, the batch is doubled.
    """
    try:
        return 1, _run(model, tracer, facts, call)
    except (ValueError, RuntimeError) as error:
        try:
            return 2, _run(model, tracer, facts, _doubled(call))
        except Exception:
            raise error from None  # that of the inputs as they are says more


def _reach(model: nn.Module, tracer: Callable[..., Tracer], facts: Facts, calls: Sequence[Call]) -> None:
    """Run a model in which values steer with random parameters and inputs, until every parameter was used.

    Otherwise its units would depend on the values of the inputs: on which expert of a mixture they choose, say.
    """
    names = {name for name, _ in model.named_parameters()}
    fruitless = 0
    for seed in range(_TRIES):
        unseen = names - facts.seen
        if not unseen or not facts.steered or fruitless == _FRUITLESS:
            return
        call = calls[seed % len(calls)]
        with suppress(Exception):  # random values may be ones that the model refuses
            twin, (args, kwargs) = variation(model, (call.args, call.kwargs), seed)
            _run(twin, tracer, facts, replace(call, args=args, kwargs=kwargs))
        fruitless = fruitless + 1 if unseen <= names - facts.seen else 0
        facts.routed |= not fruitless


def _doubled(call: Call) -> Call:
    """Return a call with every sample twice."""
    return _inputs_by(call, lambda tree: tree_map(lambda t: torch.cat([t, t]) if _is_batch(t) else t, tree))


def _is_batch(value: object) -> bool:
    """Return whether a value is a tensor with axes."""
    return isinstance(value, Tensor) and value.dim() > 0


def _inputs_by(call: Call, change: Callable[..., object]) -> Call:
    """Return a call with other inputs."""
    args, kwargs = change((call.args, call.kwargs))  # pyright: ignore[reportGeneralTypeIssues]
    return replace(call, args=args, kwargs=kwargs)


def _to_meta(tree: object) -> object:
    """Return inputs without values, of which only the shapes are left."""
    return tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, tree)


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device, where only shapes are computed."""
    twin = duplicate(model, lambda p: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    for module in twin.modules():
        for name, buffer in buffers_of(module).items():
            buffers_of(module)[name] = None if buffer is None else buffer.to("meta")
    return twin
