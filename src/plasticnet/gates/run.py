"""Runs a model under gates.

A gate multiplies what the consumers of its unit read. Gates that differ between samples multiply the activation, in a
hook that lives for one forward pass. Gates that the whole batch shares are folded into the weights of the consumers,
and so are those of single weights; `PlasticNet.compact` folds by the same function. Norms take their statistics over
the open units, and closed blocks are skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.gates.acting import hooked, input_hooks, places_of, skipping, swapped
from plasticnet.gates.checkpoints import checkpoints_by
from plasticnet.gates.compiled import NotOneGraph
from plasticnet.gates.norms import OpenStatistics
from plasticnet.gates.readers import Folded, Reader, fold, multiplied, readers
from plasticnet.gates.routing import Choice
from plasticnet.gates.sharded import folding_later, gathered_later, values_of
from plasticnet.gates.tiers import Tiers
from plasticnet.gates.watching import Watch, Watching
from plasticnet.layers.attention import unfused_layers
from plasticnet.tools.inputs import batch_size
from plasticnet.tools.locks import Lock
from plasticnet.tools.ranks import Ranks
from plasticnet.tools.torch_private import is_compiled, parameters_of
from plasticnet.units import CHOICE, Norm, Units, gate_offsets, gate_positions, is_skipped


class Gating:
    """Where the gates of all sites act on a model of its present size.

    Args:
        sites: The units of each site by name.
        model: The model.
        weights: The names of the parameters whose entries have gates of their own.
        lock: The lock of the network, which is held in every run.
        tiers: What decides which runs of a compiled model run compiled; by default all of them.

    Attributes:
        readers: The gated dimensions of parameters.
        blocks: The gated blocks, each with the index of its gate.
        per_sample: For each site, whether its gates can be drawn once per sample. That is so if all its readers have
            samples as rows, and nothing takes statistics over its units.
        fused: Whether the model has layers of torch that might run fused, without their hooks.
        known: The parameters and buffers of the model.
        shapes: Their shapes.
        keep_results: Whether a prefix must keep all its results, because something has read a result that nothing
            seemed to hold.
    """

    def __init__(
        self,
        sites: Mapping[str, Units],
        model: nn.Module,
        weights: Iterable[str] = (),
        lock: Lock | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self.model = model
        self.lock, self.tiers = lock or Lock(), tiers or Tiers(0.0)
        self.readers = readers(sites, model)
        offsets, _ = gate_offsets(sites)
        shapes = {name: t.shape for name, t in (*model.named_parameters(), *model.named_buffers())}
        device = next(model.parameters()).device
        self.blocks = [
            (model.get_submodule(block), offsets[name] + i)
            for name, u in sites.items()
            if is_skipped(u)
            for i, block in enumerate(u.blocks)
        ]
        self._normed = [(name, offsets[name], u.size, u.least) for name, u in sites.items() if u.norms]
        self.fused = any(isinstance(m, nn.TransformerEncoder | nn.TransformerEncoderLayer) for m in model.modules())
        norms: dict[tuple[str, int, str, int], list[Norm]] = {}
        self._choices: list[tuple[Choice, Tensor]] = []
        for n in dict.fromkeys(n for u in sites.values() for n in u.norms):
            if n.statistic == CHOICE:
                positions = torch.from_numpy(gate_positions(sites, (n.tensor, n.dim), shapes[n.tensor][n.dim]))
                holder, _, leaf = n.tensor.rpartition(".")
                choice = Choice(model.get_submodule(n.module), model.get_submodule(holder), leaf, n.dim)
                self._choices.append((choice, positions.to(device)))
            else:
                norms.setdefault((n.module, n.axis, n.tensor, n.dim), []).append(n)
        self._norms = [
            (
                OpenStatistics(
                    model.get_submodule(module), axis, frozenset(n.statistic for n in some), any(n.counts for n in some)
                ),
                torch.from_numpy(gate_positions(sites, (tensor, dim), shapes[tensor][dim])).to(device),
            )
            for (module, axis, tensor, dim), some in norms.items()
        ]
        self._recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        self._places = places_of(model, {name for r in self.readers for name in r.tensors} | set(weights))
        self.keep_results = False
        self._folded: Folded | None = None
        self.known = [*model.parameters(), *model.buffers()]
        self.shapes = [t.shape for t in self.known]
        fixed = {(r.tensor, r.dim) for r in self.readers if not r.per_sample}
        self.per_sample = {
            name: bool(u.consumers) and not u.norms and not any((c.tensor, c.dim) in fixed for c in u.consumers)
            for name, u in sites.items()
        }

    def run(
        self,
        z: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        best: Mapping[str, Tensor] | None = None,
        *,
        all_open: bool = False,
        watching: Watching | None = None,
        weights: Mapping[str, Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> Any:
        """Run the model under the given gates and return its output.

        A model that was compiled in place runs compiled where that pays (see `Tiers`), unless norms are masked or
        blocks may be skipped. What is compiled would not notice those, so the model then runs as it was written.
        Where gates act by hooks, it runs compiled by itself (see `HookedCalls`).

        Args:
            z: The gates of the units, shape (units + 1,) or (rows, units + 1), with a constant 1 at the end. There is
                one row for each sample, or a single row for the whole batch.
            args: The positional arguments for the model.
            kwargs: The keyword arguments for the model.
            best: For each site with a norm, the units that the norm counts where fewer than it needs are open, as the
                cut network will. By default they are the first ones.
            all_open: Whether all gates of units are 1, so that they need not act at all.
            watching: Makes a `Watch` around the call, from the tensors that gates were multiplied into.
            weights: The gates of single weights, by the name of the parameter and of its shape. None stands for open.
            ranks: The processes that run the model alike, where FSDP2 shards it.

        Raises:
            PlasticError: Gradient checkpointing is reentrant, and so would run layers again without their gates.
        """
        with self.lock, ExitStack() as stack:
            run = _Run(self, z, best, all_open, weights or {}, ranks, batch=partial(batch_size, args, kwargs))
            timed = stack.enter_context(run.timed)
            if watching is not None and not run.compiled:  # the compiler cannot follow the mode
                run.watch = watching(run.tensors.values())
            stack.callback(run.end)
            stack.enter_context(run.acting())
            if run.watch is not None:
                stack.enter_context(run.watch)  # entered last, because the work above is not part of the model
                return run.watch.output(self.model(*args, **kwargs))
            output = run.call(args, kwargs)
            if timed is not None:
                timed(output)
            return output

    @contextmanager
    def folding_once(self) -> Iterator[None]:
        """Keep the weights that gates were multiplied into within this context, for runs under the same gates."""
        before, self._folded = self._folded, Folded()
        try:
            yield
        finally:
            self._folded = before

    def folded(self, parameters: Mapping[str, Tensor], found: list[Reader], z: Tensor) -> dict[str, Tensor]:
        """Return what `fold` does, from what is kept where that is still right."""
        if self._folded is None or torch.is_grad_enabled():
            return fold(parameters, found, z)
        return self._folded.fold(parameters, found, z)

    def holds_what(self, before: Gating) -> bool:
        """Return whether the model has the parameters, in the same shapes, that it had when another gating was made."""
        now = zip(self.known, self.shapes, strict=True)
        own = [(id(p), shape) for p, shape in now if isinstance(p, nn.Parameter)]
        then = zip(before.known, before.shapes, strict=True)
        return own == [(id(p), shape) for p, shape in then if isinstance(p, nn.Parameter)]

    def masks(self, shared: Tensor, best: Mapping[str, Tensor] | None) -> list[tuple[OpenStatistics | Choice, Tensor]]:
        """Return the norms that count open units only, and the routers, each with the mask of its open entries."""
        if not self._normed:
            return []
        opened = shared > 0
        for name, start, size, least in self._normed:
            part = opened[start : start + size]
            stay = torch.arange(size, device=shared.device)[:least] if best is None else best[name]
            part[stay] |= part.sum() < least
        chosen = [(replace(c, gates=shared.index_select(0, positions)), positions) for c, positions in self._choices]
        return [(norm, opened.index_select(0, positions)) for norm, positions in (*self._norms, *chosen)]

    def holding(self, tensors: Mapping[str, Tensor], compiled: bool) -> AbstractContextManager[None]:
        """Return a context in which modules hold these tensors in the place of parameters, by name.

        Args:
            tensors: The tensors.
            compiled: Whether a module of the model was compiled in place.
        """
        compiled |= torch.compiler.is_dynamo_compiling()
        holders = {module for name in tensors for module, _ in self._places[name]}
        recurrent = [m for m in self._recurrent if not holders.isdisjoint(m.modules())]
        return swapped(self._places, tensors, recurrent, compiled)

    @property
    def normed(self) -> list[nn.Module]:
        """The norms that can count open units only, and the modules around routers."""
        return [norm.module for norm, _ in (*self._norms, *self._choices)]

    def places_of(self, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
        """Return for some of the parameters that gates act on the modules that hold them, as `places_of` does."""
        return {name: self._places[name] for name in names}

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return some of the parameters that gates act on, by name, as they are now."""
        places = self.places_of(names).items()
        return {name: parameters_of(held[0][0])[held[0][1]] for name, held in places}  # pyright: ignore[reportReturnType]


class _Run:
    """One run of a model: how its gates act while it runs, and when a checkpoint runs a part of it again.

    Args:
        gating: Where gates act.
        z: The gates of the units, as for `Gating.run`.
        best: The units that a norm counts where too few of a site are open.
        all_open: Whether all gates of units are 1.
        weights: The gates of single weights.
        ranks: The processes that run the model alike, where FSDP2 shards it.
        batch: Returns the size of the batch.

    Attributes:
        tensors: The weights that gates were multiplied into, by the name of the parameter.
        masks: The norms that count open units only, and the routers, each with the mask of its open entries.
        skipped: The closed blocks.
        compiled: Whether a module of the model was compiled in place, and runs so.
        timed: A context that times the run, where the model was compiled in place. It yields what takes the output.
        watch: What follows the run until the first gate acts, or None.
    """

    def __init__(
        self,
        gating: Gating,
        z: Tensor,
        best: Mapping[str, Tensor] | None,
        all_open: bool,
        weights: Mapping[str, Tensor],
        ranks: Ranks | None = None,
        *,
        batch: Callable[[], int],
    ) -> None:
        self.gating = gating
        self.watch: Watch | None = None
        self._running, self._hold = True, gating.lock.hold
        shared = z[0] if z.dim() == 2 else z
        per_sample = z.dim() == 2 and len(z) > 1
        reads = [r for r in gating.readers if r.per_sample] if per_sample else []
        folded = [r for r in gating.readers if not (per_sample and r.per_sample)]
        self._weights, self._shared = weights, shared
        self._read = [] if all_open else folded
        changed = {*weights, *(name for r in self._read for name in r.tensors)}
        self._later = gathered_later(gating.model, gating.places_of(changed)) if changed else []
        self.tensors = self._multiplied(changed.difference(*(held for _, held in self._later)))
        self.masks: list[tuple[OpenStatistics | Choice, Tensor]] = []
        self.skipped: list[nn.Module] = []
        self._tied: list[nn.Module] = []  # closed blocks that are open on another rank
        if not all_open:
            self.masks = gating.masks(shared, best)
            if gating.blocks:
                closed = (shared == 0).tolist()
                self.skipped = [module for module, i in gating.blocks if closed[i]]
                if ranks is not None and torch.is_grad_enabled():
                    everywhere = ranks.average((shared == 0).double()).tolist()
                    self._tied = [m for m, i in gating.blocks if closed[i] and everywhere[i] < 1]
        hooks_of_gates = input_hooks(reads, z)
        self._hooks = [*hooks_of_gates, *input_hooks(folded, None)]
        self._acts = bool(changed or self._hooks) or not all_open
        tiers = gating.tiers
        now = any(is_compiled(m) for m in gating.model.modules())
        in_place = now or tiers.start is not None
        self._by_hooks = bool(hooks_of_gates)
        unseen_hooks = self._by_hooks and (tiers.hooked is None or bool(self._later))
        unseen = bool(unseen_hooks or self.masks or (gating.blocks and not all_open))
        self._kind = (
            gating.model.training, torch.is_grad_enabled(), bool(changed), self._by_hooks,
            self._by_hooks and z.requires_grad,
        )  # fmt: skip
        self.compiled = in_place and not unseen and tiers.compiles(self._kind, batch(), self._by_hooks)
        self._eager = now and not self.compiled
        self.timed: AbstractContextManager[Callable[[Any], None] | None] = (
            tiers.timing(self._kind, self.compiled) if in_place and not unseen else nullcontext()
        )
        self._unfused = gating.fused and (bool(changed) or not all_open)

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model, while gates act, and return its output."""
        model, hooked_calls = self.gating.model, self.gating.tiers.hooked
        if not (self.compiled and self._by_hooks and hooked_calls):
            return model(*args, **kwargs)
        try:
            return hooked_calls(model, args, kwargs)
        except NotOneGraph as error:
            self.gating.tiers.give_up(self._kind)
            warnings.warn(
                "under gates per sample the model goes on as it was written, because it cannot be compiled as one "
                f'graph: {error}. Ordinary training and gates per batch (gates="batch") may still run compiled',
                stacklevel=2,
            )
        with torch.compiler.set_stance("force_eager"):
            return model(*args, **kwargs)

    def _multiplied(self, names: set[str], once: bool = False) -> dict[str, Tensor]:
        """Return the weights of these names multiplied by their gates; with ``once`` the products are not kept."""
        if not names:
            return {}
        parameters = self.gating.parameters(names)
        tensors = {
            n: multiplied(parameters[n], g, tuple(range(g.dim()))) for n, g in self._weights.items() if n in names
        }
        read = [r for r in self._read if r.tensor in names]
        folded = fold if once else self.gating.folded
        return tensors | folded({**parameters, **tensors}, read, self._shared) if read else tensors

    @contextmanager
    def acting(self, again: bool = False) -> Iterator[None]:
        """Let the gates act within this context.

        Args:
            again: Whether a part of the model runs again, which may lie within modules whose parameters were gathered.
        """
        with ExitStack() as stack:
            if self._eager:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self._unfused:
                stack.enter_context(unfused_layers())
            if self._acts and not torch.compiler.is_dynamo_compiling():
                stack.enter_context(checkpoints_by(self._wrap))
            for norm, mask in self.masks:
                stack.enter_context(norm.over(mask))
            if self.skipped:
                stack.enter_context(skipping(self.skipped, self._tied))
            if self.tensors:
                stack.enter_context(self.gating.holding(self.tensors, self.compiled))
            if self._later:
                stack.enter_context(folding_later(self._later, self._held, now=again))
            if self.watch is not None:
                stack.enter_context(hooked([(m, self.watch.end) for m in self._gates_within()]))
            stack.enter_context(hooked(self._hooks))
            yield

    def _held(self, names: set[str], again: bool) -> AbstractContextManager[None]:
        """Return a context in which modules hold some of the weights multiplied by their gates, perhaps once again."""
        if not again:
            return self.gating.holding(self._multiplied(names, once=True), self.compiled)
        gates = [self._shared, *self._weights.values()]
        tensors = values_of(partial(self._multiplied, names, once=True), self.gating.parameters(names), gates)
        return self.gating.holding(tensors, self.compiled)

    def end(self) -> None:
        """Note that the run is over."""
        self._running, self.watch = False, None

    def _gates_within(self) -> list[nn.Module]:
        """Return the modules before which a gate acts by a hook, a mask or a skip."""
        modules = [m for m, _ in (*self.gating.blocks, *self._hooks)] + self.gating.normed
        return list(dict.fromkeys(modules))

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what a checkpoint runs again in the place of a function: this function, under the gates of this run.

        What the checkpoint keeps of the first run must be all that it keeps of the second one. So results that were
        computed before the first gate are not handed over from here on.
        """
        if self.watch is not None:
            self.watch.interrupt()
        return partial(self._again, function)

    def _again(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function once more, in the backward pass."""
        if self._running:  # The model itself takes a gradient, so the gates are where they were.
            return function(*args, **kwargs)
        with self.gating.lock.again(self._hold), self.acting(again=True):
            return function(*args, **kwargs)
