"""Traces a model: it is run on example inputs, to learn which slices of parameters live and die together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from plasticnet.errors import PlasticError
from plasticnet.layers.attention import unfused_layers
from plasticnet.tools.inputs import blaming_inputs, call_arguments, copy_inputs, is_large
from plasticnet.tools.snapshot import duplicate, left_as_it_was
from plasticnet.tools.torch_private import buffers_of, schema_name
from plasticnet.tracing import contractions, rules, views  # noqa: F401  (importing registers the rules)
from plasticnet.tracing.blocks import block_sites, find_blocks
from plasticnet.tracing.facts import Facts
from plasticnet.tracing.mode import RULES, Rule, Tracer
from plasticnet.tracing.sites import build
from plasticnet.units import Trace


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
    inputs: Sequence[str] = (),
    residual: bool = False,
    blocks: Sequence[str] = (),
) -> Trace:
    """Find the units of a model by running copies of it, in evaluation and in training mode.

    The result is not self-checked, which `PlasticNet` does when it is made.

    Args:
        model: The model, which is not changed.
        example_inputs: A tuple of arguments, or a dict of keyword arguments, that the model runs on. The batch is the
            first axis.
        inputs: Name patterns of consumers whose input features get a site of their own.
        residual: Whether embeddings, and what LayerNorm, RMSNorm and similar norms normalise, get sites, too.
        blocks: Name patterns of modules that are units as a whole.

    Raises:
        PlasticError: The model rejects the inputs (the model's error is the cause), or a pattern matches nothing.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 10))
        >>> found = pn.trace(model, (torch.zeros(2, 3, 6, 6),))
        >>> {name: units.size for name, units in found.sites.items()}
        {'0': 8}
        >>> found.frozen["2"]
        "reaches the model's output"
    """
    args, kwargs = call_arguments(example_inputs)
    with unfused(), left_as_it_was(model):
        with blaming_inputs(model, args, kwargs):
            skipped, reasons = find_blocks(model, blocks, args, kwargs)
        tracer = partial(Tracer, input_patterns=inputs, residual=residual, skipped=skipped)
        facts, evaluated = _facts_of(model, tracer, args, kwargs)
    reasons.update(
        dict.fromkeys(facts.unskippable, "in training it returns something else than a tensor like its first input")
    )
    consumers = {c.module for found in facts.consumers.values() for c in found if c.axis is not None}
    for pattern in inputs:
        if not any(fnmatchcase(name, pattern) for name in consumers):
            known = ", ".join(sorted(consumers))
            raise PlasticError(f"inputs={pattern!r} matches no module whose input can be gated: {known}")
    parameters = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    traced = build(facts, [name for name in parameters if name not in facts.seen])
    traced.trains_more = any(name not in evaluated and name in facts.seen for name, _ in model.named_parameters())
    traced.positional = facts.ledger.positional
    traced.sites.update(block_sites([name for name in skipped if name not in reasons]))
    traced.frozen.update((f"{name} (as a block)", reason) for name, reason in reasons.items())
    return traced


def _facts_of(
    model: nn.Module, tracer: Callable[..., Tracer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Facts, set[str]]:
    """Return what the runs in both modes have found, and the parameters that were used in evaluation."""
    if is_large(model):
        with suppress(Exception):  # not every model runs on meta tensors, which have no values
            return _facts_of(*_on_meta(model, tracer, args, kwargs))
    facts = Facts()
    run = partial(_run, model, partial(tracer, facts=facts))
    with blaming_inputs(model, args, kwargs):
        run(args, kwargs, training=False)
    evaluated = set(facts.seen)
    _run_training(model, run, args, kwargs)
    return facts, evaluated


def _on_meta(
    model: nn.Module, tracer: Callable[..., Tracer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, Callable[..., Tracer], tuple[Any, ...], dict[str, Any]]:
    """Return the same arguments for a copy of the model on the meta device, where only shapes are computed."""
    twin = duplicate(model, lambda p: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    for module in twin.modules():
        for name, buffer in buffers_of(module).items():
            buffers_of(module)[name] = None if buffer is None else buffer.to("meta")
    args, kwargs = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs))
    return twin, tracer, args, kwargs


def _run(
    model: nn.Module, tracer: Callable[..., Tracer], args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
) -> None:
    """Trace one run of a copy of the model; the run in evaluation counts multiplications."""
    twin = duplicate(model).train(training)  # on a copy, because a merged LoRA changes its parameters here
    args, kwargs = copy_inputs((args, kwargs))
    tracer(twin, count=not training).run(args, kwargs)


def _run_training(model: nn.Module, run: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Trace a run in training mode, because layers that run only there (auxiliary heads) join units, too.

    BatchNorm refuses statistics over a single sample. So where the run fails, the batch is doubled.

    Raises:
        PlasticError: The model does not run in training mode.
    """
    try:
        run(args, kwargs, training=True)
    except (ValueError, RuntimeError):
        args, kwargs = tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t, (args, kwargs))
        try:
            run(args, kwargs, training=True)
        except (ValueError, RuntimeError) as error:
            raise PlasticError(
                f"{type(model).__name__} runs on the example inputs in evaluation but not in training mode: {error}. "
                "Pass example inputs that it can train on (a batch of two or more, say)."
            ) from error


@contextmanager
def unfused() -> Iterator[None]:
    """Let attention and recurrent layers run through their plain operations within this context."""
    (mkldnn, *_) = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        with unfused_layers(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=mkldnn)
