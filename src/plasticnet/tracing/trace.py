"""Traces a model: it is run on example inputs, to learn which slices of parameters live and die together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from plasticnet.errors import PlasticError
from plasticnet.layers.attention import unfused_layers
from plasticnet.tools.gradients import with_gradients_if_needed
from plasticnet.tools.inputs import MORE, Call, Outputs, blaming_inputs, calls_of
from plasticnet.tools.snapshot import left_as_it_was
from plasticnet.tools.torch_private import is_scripted, schema_name

# Importing these files registers the rules.
from plasticnet.tracing import (  # noqa: F401
    contractions,
    indexing,
    parametrizations,
    quantisation,
    rules,
    stacks,
    views,
    windows,
)
from plasticnet.tracing.blocks import block_sites, find_blocks
from plasticnet.tracing.experts import find_experts
from plasticnet.tracing.identity import branch_ends
from plasticnet.tracing.mode import RULES, Rule, Tracer
from plasticnet.tracing.runs import Runs, observe
from plasticnet.tracing.sites import build
from plasticnet.units import IDLE, SCRIPTED, Trace


def register_rule(op: Any, rule: Rule | str) -> None:
    """Teach tracing how an operation moves labels.

    An operation without a rule freezes all units that it reads. docs/design/how-to-add.md shows how to write a rule.

    Args:
        op: An ``OpOverload``, an ``OpOverloadPacket``, or a name such as ``"mylib::gelu2"``.
        rule: The rule. After the operation has run, it is called as ``rule(tracer, func, args, kwargs, out)``, and
            attaches labels to ``out`` by ``tracer.put``. Or the name of an operation whose rule is used here, too, such
            as ``"aten::pointwise"``.

    Raises:
        PlasticError: The named operation has no rule.

    Example:
        >>> import plasticnet as pn
        >>> pn.register_rule("mylib::gelu2", "aten::pointwise")
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise PlasticError(f"no operation {rule!r} has a rule; known: {', '.join(sorted(RULES))}")
        rule = RULES[rule]
    RULES[op if isinstance(op, str) else schema_name(op)] = rule


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Sequence[Any] = (),
    inputs: Sequence[str] = (),
    residual: bool = False,
    blocks: Sequence[str] = (),
    head_dims: Sequence[str] = (),
    experts: Sequence[str] = (),
    outputs: Outputs | None = None,
) -> Trace:
    """Find the units of a model by running copies of it, in evaluation and in training mode.

    The result is not self-checked, which `PlasticNet` does when it is made.

    Args:
        model: The model, which is not changed.
        example_inputs: A tuple of arguments, or a dict of keyword arguments, that the model runs on. The batch is the
            first axis.
        more_inputs: A list of further such tuples and dicts: what the model trains on, if that is something else, or
            what leads into other branches. It runs on each of them in evaluation or in training mode.
        inputs: Name patterns of consumers whose input features get a site of their own.
        residual: Whether embeddings, and what LayerNorm, RMSNorm and similar norms normalise, get sites, too.
        blocks: Name patterns of modules that are units as a whole.
        head_dims: Name patterns of attention modules, or of their projections, in whose heads the dimensions are the
            units, and not the heads.
        experts: Name patterns of lists or stacks of experts, which are units as a whole.
        outputs: A function that returns what is read of the model's output; by default all of it is.

    Raises:
        PlasticError: The model rejects the inputs (the model's error is the cause), a pattern matches nothing, or
            TorchScript has compiled the model.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 10))
        >>> found = pn.trace(model, (torch.zeros(2, 3, 6, 6),))
        >>> {name: units.size for name, units in found.sites.items()}
        {'0': 8}
        >>> found.frozen["2"]
        "reaches the model's output"
    """
    calls = calls_of(example_inputs, more_inputs, outputs)
    return with_gradients_if_needed(lambda: explore(model, calls, inputs, residual, blocks, head_dims, experts)[0])


def explore(
    model: nn.Module,
    calls: Sequence[Call],
    inputs: Sequence[str],
    residual: bool,
    blocks: Sequence[str],
    head_dims: Sequence[str],
    experts: Sequence[str],
) -> tuple[Trace, Runs]:
    """Return what `trace` does, and what is known of the runs of the model.

    Args:
        model: The model.
        calls: The calls in evaluation mode, the example inputs first.
        inputs: As in `trace`.
        residual: As in `trace`.
        blocks: As in `trace`.
        head_dims: As in `trace`.
        experts: As in `trace`.

    Raises:
        PlasticError: As `trace` raises it.
    """
    if is_scripted(model):
        raise PlasticError(
            f"{type(model).__name__} is {SCRIPTED}: give the module as it was before torch.jit.script or "
            "torch.jit.trace, and compile what compact() returns"
        )
    for pattern in head_dims:
        if not any(fnmatchcase(name, pattern) for name, _ in model.named_modules()):
            raise PlasticError(f"head_dims={pattern!r} matches no module of {type(model).__name__}")
    with unfused(), left_as_it_was(model):
        with blaming_inputs(model, calls[0].args, calls[0].kwargs):
            skipped, reasons = find_blocks(model, blocks, calls)
            ends = branch_ends(model, skipped, calls)
        tracer = partial(Tracer, input_patterns=inputs, residual=residual, skipped=skipped, head_dims=head_dims)
        # In training alone some mixtures limit how many rows an expert takes, or return a loss that balances them.
        runs = observe(model, tracer, calls, both=bool(experts))
    facts = runs.facts
    reasons.update(
        dict.fromkeys(facts.unskippable, "in training it returns something else than a tensor like its first input")
    )
    consumers = {c.module for found in facts.consumers.values() for c in found if c.axis is not None}
    for pattern in inputs:
        if not any(fnmatchcase(name, pattern) for name in consumers):
            known = ", ".join(sorted(consumers))
            raise PlasticError(f"inputs={pattern!r} matches no module whose input can be gated: {known}")
    tensors = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    traced = build(facts, [name for name in tensors if name not in facts.seen], runs.refused)
    traced.positional, traced.steered, traced.stateful = facts.ledger.positional, facts.steered, facts.stateful
    traced.random, traced.sorting = facts.random, facts.sorting
    traced.sites.update(block_sites([name for name in skipped if name not in reasons], ends))
    traced.frozen.update((f"{name} (as a block)", reason) for name, reason in reasons.items())
    found, others = find_experts(model, experts, traced.sites, traced.uses)
    traced.sites.update(found)
    traced.frozen.update((f"{name} (as experts)", reason) for name, reason in others.items())
    traced.frozen.update(_idle(model, facts.seen))
    return traced, runs


def _idle(model: nn.Module, seen: set[str]) -> dict[str, str]:
    """Return the outermost modules of which no parameter was used, and single parameters, with the reason."""
    used: dict[str, bool] = {}  # for each part of the model that has parameters, whether any of them was used
    for name, _ in model.named_parameters():
        parts = name.split(".")
        for part in (".".join(parts[: n + 1]) for n in range(len(parts))):
            used[part] = used.get(part, False) or name in seen
    idle: dict[str, str] = {}
    for part, _ in [*model.named_modules(), *model.named_parameters()]:
        within = any(f"{part}.".startswith(f"{outer}.") for outer in idle)
        if not used.get(part, True) and not within:
            idle[part] = f"{IDLE}: nothing is known of what reads it; give inputs that reach it, too: {MORE}"
    return idle


@contextmanager
def unfused() -> Iterator[None]:
    """Let attention and recurrent layers run through their plain operations within this context."""
    (mkldnn, *_) = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        with unfused_layers(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=mkldnn)
