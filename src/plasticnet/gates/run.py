"""Runs a model under gates.

A gate multiplies what the consumers of its unit read. Gates that differ between samples multiply the activation, in a
hook that lives for one forward pass. Gates that the whole batch shares are folded into the weights of the consumers,
and so are those of single weights; `PlasticNet.compact` folds by the same function. Norms take their statistics over
the open units, and closed blocks are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plasticnet.gates.acting import (
    called_before,
    gated_inputs,
    places_of,
    refusing_checkpoints,
    skipping,
    swapped,
)
from plasticnet.gates.norms import open_statistics
from plasticnet.gates.readers import Reader, fold, readers
from plasticnet.layers.attention import unfused_layers
from plasticnet.tools.torch_private import is_compiled, parameters_of
from plasticnet.units import BlockUnits, Units, gate_offsets, gate_positions


class Watch(Protocol):
    """A context around one call of the model that follows its functions until the first gate acts."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...

    def end(self, *_: Any) -> None:
        """Note that the first gate acts."""
        ...

    def output(self, output: Any) -> Any:
        """Take what the model returns, and return it."""
        ...


# It makes a watch from the tensors that gates were multiplied into.
Watching = Callable[[Iterable[Tensor]], Watch]


class Gating:
    """Where the gates of all sites act on a model of its present size.

    Args:
        sites: The units of each site by name.
        model: The model.
        weights: The names of the parameters whose entries have gates of their own.

    Attributes:
        readers: The gated dimensions of parameters.
        blocks: The gated blocks, each with the index of its gate.
        per_sample: For each site, whether its gates can be drawn once per sample. That is so if all its readers have
            samples as rows, and nothing takes statistics over its units.
        known: The parameters and buffers of the model.
        keep_results: Whether a prefix must keep all its results, because something has read a result that nothing
            seemed to hold.
    """

    def __init__(self, sites: Mapping[str, Units], model: nn.Module, weights: Iterable[str] = ()) -> None:
        self.model = model
        self.readers = readers(sites, model)
        offsets, _ = gate_offsets(sites)
        shapes = {name: t.shape for name, t in model.named_parameters()}
        device = next(model.parameters()).device
        self.blocks = [
            (model.get_submodule(block), offsets[name] + i)
            for name, u in sites.items()
            if isinstance(u, BlockUnits)
            for i, block in enumerate(u.blocks)
        ]
        self._normed = [(name, offsets[name], u.size) for name, u in sites.items() if u.norms]
        self._fused = any(isinstance(m, nn.TransformerEncoder | nn.TransformerEncoderLayer) for m in model.modules())
        norms = dict.fromkeys(n for u in sites.values() for n in u.norms)
        self._norms = [
            (
                model.get_submodule(n.module),
                n.axis,
                torch.from_numpy(gate_positions(sites, (n.tensor, n.dim), shapes[n.tensor][n.dim])).to(device),
            )
            for n in norms
        ]
        self._recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        self._places = places_of(model, {r.tensor for r in self.readers} | set(weights))
        self.keep_results = False
        self.known = [*model.parameters(), *model.buffers()]
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
    ) -> Any:
        """Run the model under the given gates and return its output.

        A model that was compiled in place, by ``model.compile()``, runs compiled unless gates act by hooks, norms are
        masked or blocks may be skipped. What is compiled would not notice those, so the model then runs as it was
        written.

        Args:
            z: The gates of the units, shape (units + 1,) or (rows, units + 1), with a constant 1 at the end. There is
                one row for each sample, or a single row for the whole batch.
            args: The positional arguments for the model.
            kwargs: The keyword arguments for the model.
            best: For each site with a norm, the unit that the norm counts where all units of the site are closed, as
                the cut network will. By default it is the first unit.
            all_open: Whether all gates of units are 1, so that they need not act at all.
            watching: Makes a `Watch` around the call, from the tensors that gates were multiplied into.
            weights: The gates of single weights, by the name of the parameter and of its shape. None stands for open.

        Raises:
            PlasticError: Gradient checkpointing would run layers again in the backward pass.
        """
        shared = z[0] if z.dim() == 2 else z
        per_sample = z.dim() == 2 and len(z) > 1
        hooked = [r for r in self.readers if r.per_sample] if per_sample else []
        folded = [r for r in self.readers if not (per_sample and r.per_sample)]
        parameters = self._parameters() if weights or not all_open else {}
        tensors = {name: parameters[name] * g.to(parameters[name].dtype) for name, g in (weights or {}).items()}
        with ExitStack() as stack:
            if any(is_compiled(m) for m in self.model.modules()):
                watching = None  # the compiler cannot follow the mode
                if hooked or (not all_open and (self._norms or self.blocks)):
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
            if tensors or not all_open:
                if self._fused:
                    stack.enter_context(unfused_layers())
                if torch.is_grad_enabled():
                    stack.enter_context(refusing_checkpoints())
            if not all_open:
                tensors |= fold({**parameters, **tensors}, folded, shared)
                self._mask(stack, shared, best)
            if tensors:
                stack.enter_context(swapped(self._places, tensors, self._recurrent))
            watch = None if watching is None else watching(tensors.values())
            if watch is not None:
                stack.enter_context(called_before(self._gates_within(hooked, folded), watch.end))
            stack.enter_context(gated_inputs(hooked, z))
            stack.enter_context(gated_inputs(folded, None))
            if watch is not None:
                stack.enter_context(watch)  # entered last, because the work above is not part of the model
                return watch.output(self.model(*args, **kwargs))
            return self.model(*args, **kwargs)

    def _mask(self, stack: ExitStack, shared: Tensor, best: Mapping[str, Tensor] | None) -> None:
        """Let norms count open units only, and closed blocks return their input, for as long as the stack is open."""
        opened = shared > 0
        for name, start, size in self._normed:
            part = opened[start : start + size]
            part |= ~part.any() & (torch.arange(size, device=shared.device) == (0 if best is None else best[name]))
        for norm, axis, positions in self._norms:
            stack.enter_context(open_statistics(norm, axis, opened.index_select(0, positions)))
        if self.blocks:
            skipped = (shared == 0).tolist()
            stack.enter_context(skipping(module for module, i in self.blocks if skipped[i]))

    def _gates_within(self, hooked: list[Reader], folded: list[Reader]) -> list[nn.Module]:
        """Return the modules before which a gate acts by a hook, a mask or a skip."""
        gates = [m for m, *_ in (*self.blocks, *self._norms)]
        return gates + [r.owner for r in (*hooked, *(r for r in folded if r.select is not None))]

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters that gates act on, by name, as they are now."""
        return {name: parameters_of(held[0][0])[held[0][1]] for name, held in self._places.items()}  # pyright: ignore[reportReturnType]
