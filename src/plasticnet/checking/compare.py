"""Compares the outputs of a masked model with those of a cut one, and the outputs before and after growth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.gates.run import Gating
from plasticnet.surgery.compact import cut
from plasticnet.surgery.plan import lengths, plan_resize
from plasticnet.surgery.rewrite import apply_plan
from plasticnet.tools.difference import relative_difference
from plasticnet.tools.inputs import copy_inputs
from plasticnet.tools.snapshot import left_as_it_was, sharing
from plasticnet.tools.torch_private import Dropout
from plasticnet.tools.trees import tensors_within
from plasticnet.units import BlockUnits, InputUnits, Units

# The relative tolerances in double precision, in which some norms still compute in single, and in other precisions.
FINE, ROUGH = 2e-6, 1e-3
_DISAGREE = "cutting its units changes the output: the model uses its width in a way that tracing cannot see"
BLIND = "closing its units does not move the output, so that the check cannot vouch for it"


class Comparing:
    """A model with random parameters and its inputs, on which masking and cutting are compared.

    Args:
        model: The model, in evaluation mode. It is left as it was.
        args: The positional arguments on which it is run.
        kwargs: The keyword arguments on which it is run.
        tolerance: The largest relative difference of outputs that counts as rounding.
        patterns: Functions that give the gates of a site, shape (units,), for its number of units. All sites are
            compared under the first one, then under the next.
        training: Whether outputs are compared in training mode, too.
        vouch: Whether sites fail when closing their units under the last pattern does not change the output.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tolerance: float,
        patterns: list[Callable[[int], Tensor]],
        training: bool = False,
        vouch: bool = True,
    ) -> None:
        self.model, self.args, self.kwargs, self.tolerance = model, args, kwargs, tolerance
        self.patterns, self.training, self.vouch = patterns, training, vouch

    @cached_property
    def reference(self) -> list[Tensor]:
        """The outputs of the model in evaluation mode with all units open."""
        return self.outputs(self.model)

    def outputs(self, model: nn.Module, training: bool = False) -> list[Tensor]:
        """Return the outputs of a model, in evaluation mode or in training mode without dropout."""
        args, kwargs = copy_inputs((self.args, self.kwargs))
        with torch.no_grad(), _mode(model, training):
            return _comparable(model(*args, **kwargs))

    def masked(self, sites: Mapping[str, Units], factors: Mapping[str, Tensor], training: bool = False) -> list[Tensor]:
        """Return the outputs of the whole model with the gates multiplied in.

        Args:
            sites: The sites that have gates.
            factors: The gates of each of these sites, shape (units,).
            training: Whether the model runs in training mode, without dropout.
        """
        z = torch.cat([*factors.values(), next(iter(factors.values())).new_ones(1)])
        args, kwargs = copy_inputs((self.args, self.kwargs))
        with left_as_it_was(self.model), _mode(self.model, training):
            return _comparable(Gating(sites, self.model).run(z, args, kwargs))

    def cut_differs(self, sites: Mapping[str, Units]) -> str | None:
        """Return why masking and cutting differ for these sites, or None if they agree under every pattern.

        Under the last pattern all gated blocks are closed.
        """
        device = next(self.model.parameters()).device
        for pattern in self.patterns:
            last = pattern is self.patterns[-1]
            factors = {
                n: (torch.zeros(u.size) if last and isinstance(u, BlockUnits) else pattern(u.size)).to(device)
                for n, u in sites.items()
            }
            try:
                small = cut(sharing(self.model), sites, factors)
                compared = self.outputs(small)
                trained = self.outputs(small, training=True) if self.training else []
            except Exception as error:  # a forward that hard-codes a width can raise anything
                what = str(error).splitlines()[0][:200] if str(error) else repr(error)
                return f"the model does not run when units are cut: {what}"
            masked = self.masked(sites, factors)
            if relative_difference(masked, compared) > self.tolerance:
                return _DISAGREE
            if self.training:
                masked_in_training = self.masked(sites, factors, training=True)
                if relative_difference(masked_in_training, trained) > self.tolerance:
                    return _DISAGREE
            if not masked:
                return "the model has no floating-point output to compare"
            closed = any((f == 0).any() for f in factors.values())
            if last and self.vouch and closed and all(map(torch.equal, self.reference, masked)):
                return BLIND
        return None

    def growth_differs(self, sites: Mapping[str, Units]) -> str | None:
        """Return why one more unit for each of these sites changes the output or fails, or None.

        The new units read with random weights and are read with weights of zero, so that the output should stay.
        """
        sources = {n: [*range(u.size), -1] for n, u in sites.items() if u.growable and not isinstance(u, InputUnits)}
        try:
            grown = sharing(self.model)
            apply_plan(grown, plan_resize(sites, lengths(grown), sources), {})
            if relative_difference(self.reference, self.outputs(grown)) > self.tolerance:
                return "growing its units changes the output"
        except Exception as error:  # a forward that hard-codes a width can raise anything
            return f"the model does not run when units are added: {error}"
        return None


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within this context the model is in evaluation mode, or in training mode without dropout.

    Dropout would draw differently for other widths. Afterwards the model is in evaluation mode.
    """
    model.train(training)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.eval()
    try:
        yield
    finally:
        model.eval()


def _comparable(tree: Any) -> list[Tensor]:
    """Return the real and complex tensors in what a model returned.

    Integers are left out, and so are other objects, such as a cache of keys and values.
    """
    return [t for t in tensors_within(tree) if t.is_floating_point() or t.is_complex()]
