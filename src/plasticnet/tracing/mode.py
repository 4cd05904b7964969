"""Runs a model once under a dispatch mode, in which every operation moves its labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from plasticnet.tools.gradients import without_gradients
from plasticnet.tools.inputs import Call, copy_inputs
from plasticnet.tools.torch_private import (
    differentiates_now,
    flat_names,
    is_scripted,
    schema_name,
    written_arguments,
)
from plasticnet.tools.trees import tensors_within
from plasticnet.tracing.constants import Constants
from plasticnet.tracing.counts import Counting
from plasticnet.tracing.facts import Facts
from plasticnet.tracing.labels import NO_LEVERS, Axis, Levers, Mark, Tag, has_labels, labelled, plain
from plasticnet.tracing.liveness import Liveness
from plasticnet.tracing.operations import Operations
from plasticnet.units import READ, SCRIPTED

# A rule moves labels. It is called with the tracer, the operation, its two kinds of arguments, and its result.
Rule = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Return a decorator that registers a rule of the library for the operations of these names, by default of ATen."""

    def register(function: Rule) -> Rule:
        RULES.update((name if "::" in name else f"aten::{name}", function) for name in names)
        return function

    return register


class Tracer(TorchDispatchMode):
    """Moves labels while a model runs. Rules use its methods `tag`, `put`, `meet` and `freeze`, and its ``ledger``.

    Args:
        model: The model; labels are made for all its parameters and buffers.
        facts: What the runs of the model find, to which this run adds.
        input_patterns: Name patterns of modules whose input features get a site of their own.
        count: Whether this run counts how often each entry of a parameter is multiplied.
        residual: Whether norms may take their statistics over open units, and embeddings get gates.
        skipped: The names of the blocks.
        head_dims: Name patterns of modules in whose heads the dimensions are the units.

    Attributes:
        ledger: The ledger of the facts.
        liveness: Which operations had a part in what is read; what others freeze does not count.
        tags: The labels of each tensor that was seen.
        calls: The modules that are running, innermost last, each with its first input.
        batch: The length of the batch.
        dimensions: The labels of the dimensions of heads that the last product of queries and keys has summed over.
        names: The name of each parameter and buffer, by its ``id``.
        parameters: The shapes of the parameters, by name.
        operations: What the last run consisted of.
        constants: Which tensors follow neither from parameters and buffers nor from inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        facts: Facts,
        input_patterns: Sequence[str] = (),
        count: bool = True,
        residual: bool = False,
        skipped: Sequence[str] = (),
        head_dims: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.facts = facts
        self.ledger = facts.ledger
        self.ledger.head_dims = tuple(head_dims)
        self.model = model
        self.input_patterns = input_patterns
        self.count = count
        self.residual = residual
        self.skipped = skipped
        self.liveness = Liveness()
        self.tags: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.calls: list[tuple[str, Tensor | None]] = []
        self._before: list[Tag | None] = []  # the labels that these first inputs had when their module began
        self.batch: int | None = None
        self.dimensions: np.ndarray | None = None
        self.names: dict[int, str] = {}
        self.parameters = {name: p.shape for name, p in model.named_parameters()}
        self.operations, self.constants = Operations(), Constants(model)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names[id(tensor)] = name
            axes = tuple(labelled(self.ledger.fresh(name, d, n)) if n else plain(n) for d, n in enumerate(tensor.shape))
            own = [frozenset({(name, d)}) if name in self.parameters else NO_LEVERS for d in range(tensor.dim())]
            self.tags[tensor] = Tag(axes, tuple(own), static=True)
        for name, module in model.named_modules():
            if isinstance(module, nn.RNNBase):
                self._tie_layers(f"{name}." if name else "", module)
            if is_scripted(module):
                for leaf, tensor in [*module.named_parameters(name, False), *module.named_buffers(name, False)]:
                    for d, size in enumerate(tensor.shape):
                        self.ledger.freeze(self.ledger.fresh(leaf, d, size), SCRIPTED)

    def _tie_layers(self, prefix: str, module: nn.RNNBase) -> None:
        """Join the units of all layers and directions of a recurrent module, which have one hidden size in common.

        With a projection these are the projected units. Torch needs more hidden units than projected ones, so the
        hidden ones are frozen, and the projected ones only become fewer.
        """
        first, *others = [prefix + n for n in flat_names(module) if n.startswith("weight_hh")]
        size = module.proj_size or module.hidden_size
        for other in others:
            self.ledger.join(self.ledger.fresh(first, 1, size), self.ledger.fresh(other, 1, size))
        for name in [prefix + n for n in flat_names(module) if n.startswith("weight_hr")]:
            hidden = self.ledger.fresh(name, 1, module.hidden_size)
            self.ledger.freeze(hidden, "the hidden units of a recurrent layer with a projection, which must be more")
            self.facts.capped.add((name, 0))

    # -- running ----------------------------------------------------------------------------

    def run(self, call: Call) -> None:
        """Run the model once on copies of the inputs of a call, and freeze all labels in what is read of its output."""
        args, kwargs = copy_inputs((call.args, call.kwargs))
        self.operations = Operations()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.dim():
                self.batch = self.batch or tensor.shape[0]
                mark = Mark.BATCH if tensor.shape[0] == self.batch else Mark.NONE
                self.tags[tensor] = Tag((plain(tensor.shape[0], mark), *map(plain, tensor.shape[1:])))
        counting = Counting(self.facts, self.tag)
        handles: list[Any] = counting.hooks(self.model)
        for name, module in self.model.named_modules():
            held = next(module.parameters(recurse=False), None) is not None or is_parametrized(module)
            if held and not is_scripted(module):
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        for name in self.skipped:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_hook(partial(self._skip, name), with_kwargs=True))
        try:
            with without_gradients(), self.liveness.watching(), self:
                out = self.model(*args, **kwargs)
                read = call.read(out)
        except BaseException:
            self.ledger.frozen += self.liveness.take(everything=True)
            raise
        finally:
            for handle in handles:
                handle.remove()
        counting.note_outputs(self.model, out)
        own = [*self.model.parameters(), *self.model.buffers()]  # which runs in another mode may read
        self.liveness.reads([*tensors_within(read), *tensors_within((args, kwargs)), *own])
        self.ledger.frozen += self.liveness.take()
        for tensor in tensors_within(read):
            self.freeze(tensor, READ)
        for tensor in tensors_within((args, kwargs)):  # the inputs themselves have no labels
            self.freeze(tensor, "the model puts it into one of its arguments, which the caller reads")

    def _enter(self, name: str) -> Callable[..., None]:
        """Return a hook that notes that the module of this name begins to run."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            self.calls.append((name, first))
            self._before.append(None if first is None else self.tags.get(first))
            if first is not None and not self.tag(first).static:
                self.put(first, Tag(self.tag(first).axes, (self.input_levers,) * first.dim()))

        return hook

    def _leave(self, *_: Any) -> None:
        """Note that the innermost module has ended, and give its first input the levers that it had before."""
        first, before = self.calls.pop()[1], self._before.pop()
        if first is not None:
            tag = self.tag(first)
            same = before is not None and tag.axes is before.axes
            self.put(first, before if same and before else Tag(tag.axes, (), tag.static, tag.blank))

    @property
    def input_levers(self) -> Levers:
        """The levers of the first input of the innermost module, and of what is zero where this input is."""
        return frozenset({(f"the input of {self.calls[-1][0]}", len(self.calls))}) if self.calls else NO_LEVERS

    def _skip(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Join the units of a block's output with those of its first input, which a closed block returns."""
        first = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(out, Tensor) or out.shape != first.shape:
            self.facts.unskippable.add(name)
            return
        a, b = self.ledger.settle(self.tag(first)), self.ledger.settle(self.tag(out))
        for i in range(out.dim()):
            self.meet(self.ledger.read(a, i), self.ledger.read(b, i), "a block hands on something that cannot be cut")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.operations.note(func, args, kwargs, self.names.get(id(args[0])) if args else None)
        out, before = func(*args, **kwargs), len(self.ledger.frozen)
        self.facts.seen.update(self.names[id(t)] for t in tensors if id(t) in self.names)
        if differentiates_now():  # The model takes a gradient. Whatever gates do to its function, they do to that, too.
            self.liveness.differentiated = True
            return out
        written = [(t, self.tag(t).levers) for t in written_arguments(func, args, kwargs)]
        constant = self.constants.behind(func, tensors, [self.tags.get(t) for t in tensors])
        self._move(func, tensors, args, kwargs, out)
        self.constants.note(constant, tensors_within(out))
        for t, levers in written:
            self._forget_levers(t, levers)
        self.liveness.note(func, tensors, out, self.ledger.frozen[before:])
        del self.ledger.frozen[before:]  # until something reads what has become of it
        return out

    def _move(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any, out: Any) -> None:
        """Move the labels of an operation by its rule."""
        self.facts.random |= torch.Tag.nondeterministic_seeded in func.tags and not self.model.training
        self._note_steering(func, tensors)
        found = RULES.get(schema_name(func))
        if found is None and torch.Tag.pointwise in func.tags:
            found = RULES["aten::pointwise"]
        if found is None:
            self.unknown(func, tensors)
            static = all(self.tag(t).static or self.tags.get(t) is None for t in tensors)
            for t in tensors_within(out):
                self.put(t, Tag(tuple(map(plain, t.shape)), static=static))
            return
        try:
            found(self, func, args, kwargs, out)
        except Exception as error:  # a rule cannot foresee every use of its operation
            self.unknown(func, tensors, f"whose rule fails here with {error!r}")

    def _forget_levers(self, written: Tensor, before: tuple[Levers, ...]) -> None:
        """Let tensors that share the memory of one that was written to lose their levers, if that one has lost some.

        Args:
            written: The tensor that was written to, perhaps a view of another one.
            before: The levers that it had.
        """
        now = self.tag(written)
        if all(own <= now.levers_of(d) for d, own in enumerate(before) if d < len(now.axes)):
            return
        for other in list(self.tags.keys()):
            tag = self.tags.get(other)
            if (
                other is not written
                and tag is not None
                and any(tag.levers)
                and self.liveness.shares_memory(other, written)
            ):
                self.put(other, Tag(tag.axes, (), tag.static, tag.blank))

    def _note_steering(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """Note an operation whose result has a shape that depends on values, because the model can branch on shapes."""
        if torch.Tag.dynamic_output_shape in func.tags:
            masks = any(t.dtype in (torch.bool, torch.uint8) for t in tensors)
            if masks or schema_name(func) != "aten::index":
                self.facts.steered = self.facts.routed = True

    def unknown(self, func: Any, tensors: Sequence[Tensor], why: str = "for which there is no rule") -> None:
        """Freeze all labels of these tensors, because nothing is known of the operation that reads them."""
        for t in tensors:
            tag = self.tags.get(t) or self.tag(t)  # the operation may have changed the axes of the tensor itself
            self.freeze_axes(tag, f"used by {schema_name(func)}, {why} (see register_rule)", range(len(tag.axes)))

    # -- what rules use ---------------------------------------------------------------------

    def tag(self, tensor: Tensor) -> Tag:
        """Return the labels of a tensor; one that was never seen has none."""
        found = self.tags.get(tensor)
        if found is None or len(found.axes) != tensor.dim():
            found = Tag(tuple(plain(n) for n in tensor.shape))
        return found

    def put(self, tensor: Tensor, tag: Tag) -> None:
        """Attach labels to the result of an operation."""
        self.tags[tensor] = tag

    def freeze(self, tensor: Tensor, reason: str, axes: Sequence[int] | None = None) -> None:
        """Freeze all labels on some axes of a tensor.

        Args:
            tensor: The tensor.
            reason: Why nothing can be cut there, for people to read.
            axes: The axes, or None for all.
        """
        tag = self.tag(tensor)
        self.freeze_axes(tag, reason, range(len(tag.axes)) if axes is None else axes)

    def freeze_axes(self, tag: Tag, reason: str, axes: Sequence[int]) -> None:
        """Freeze all labels on these axes of a tag."""
        for i in axes:
            if has_labels(tag.axes[i]):
                self.ledger.freeze(self.ledger.read(tag, i), reason)

    def meet(self, a: np.ndarray, b: np.ndarray, reason: str) -> None:
        """Join the labels of two axes of equal length, and freeze a label that meets none.

        Args:
            a: The labels of one axis, -1 for none.
            b: The labels of the other axis.
            reason: Why a label that meets none cannot be cut.
        """
        self.ledger.join(a, b)
        self.ledger.freeze(np.where(b < 0, a, -1), reason)
        self.ledger.freeze(np.where(a < 0, b, -1), reason)

    def attach(self, labels: np.ndarray, vector: Tensor | None, reason: str, axis: int = 0) -> None:
        """Join the labels of a vector that has one entry for each channel with those of the channels.

        Args:
            labels: The labels of the channels.
            vector: A bias, the weight of a norm, a running mean, and so on. None, and a scalar, are left alone.
            reason: Why a label that meets none cannot be cut.
            axis: The axis of the vector.
        """
        if vector is not None and vector.dim():
            constant = self.constants.among([vector])
            reason = f"combined with {constant}" if constant else reason
            self.meet(labels, self.ledger.read(self.tag(vector), axis), reason)

    def produce(self, weight: Tensor, axis: int, merging: bool = False) -> Axis:
        """Note that units are born in one dimension of a weight, and return the axis that they form in the output.

        Args:
            weight: A parameter, or a weight that is computed from one.
            axis: Its axis.
            merging: Whether the weight is multiplied with another one, as in an adapter of low rank. If the dimension
                turns out to read units, then none are born there.
        """
        tag = self.tag(weight)
        labels = self.ledger.read(tag, axis)
        if tag.static:  # the units of a computed weight are born in what it is computed from
            for key in sorted(tag.levers_of(axis)) or self.ledger.origins_of(labels):
                if merging and key not in self.facts.producers:
                    self.facts.merging.add(key)
                elif not merging:
                    self.facts.merging.discard(key)
                self.facts.producers.setdefault(key)
        return tag.axes[axis] if len(tag.axes[axis]) == 1 else labelled(labels)
