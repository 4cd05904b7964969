"""Scores the entries of single weights that have gates, by the same rules as units.

The derivative of the loss with respect to an entry's gate is the entry times its gradient. All samples share it, so the
squares of the samples' own derivatives are had from sums of their losses with random signs: the mean square of such a
sum is the sum of their squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from plasticnet.learning.passes import run_closure
from plasticnet.learning.sampler import Pass
from plasticnet.net import PlasticNet
from plasticnet.oneshot.derivatives import dependent, random_signs, with_gradients_of
from plasticnet.oneshot.fisher import DRAWS, drawn_sums, up_to
from plasticnet.tools.batches import Forward, rows, run_batch
from plasticnet.tools.inputs import Loss, Outputs

_SEED = 0


def entries_by_size(net: PlasticNet) -> list[Tensor]:
    """Return the squares of the open entries, for each gated weight in its shape, in double precision."""
    return [net.model.get_parameter(w.name).detach().double().square() * w.open for w in net.weights.values()]


def entries_by_loss(net: PlasticNet, loss: Loss, kind: str) -> list[Tensor]:
    """Return the squared derivatives of a loss with respect to the gates of entries, for each gated weight.

    Args:
        net: The network.
        loss: A function without arguments that returns losses, shape (batch,), or their mean.
        kind: "fisher" for half the mean square of the samples' own derivatives, else the square of their mean is taken.
    """
    generator = torch.Generator().manual_seed(_SEED)

    def sums(f: Tensor) -> list[Tensor]:
        if kind != "fisher" or not f.dim():
            return [f.mean()]
        signs = random_signs((DRAWS, len(f)), generator).to(f)
        return [(s * f).sum() / len(f) ** 0.5 for s in signs]

    found = _squares(net, lambda: sums(dependent(run_closure(net, net.sampler, loss, Pass()))))
    return [g / 2 for g in found] if kind == "fisher" else found


def entries_by_outputs(
    net: PlasticNet, batches: Iterable[Any], most: int, forward: Forward | None, outputs: Outputs | None
) -> list[Tensor]:
    """Return half the mean square of the derivatives for targets that are drawn from the model's own outputs.

    Args:
        net: The network.
        batches: The inputs, which can be read again and again.
        most: The number of inputs at which reading stops.
        forward: What runs the network on a batch, where its form does not fit.
        outputs: What counts in the output; None for all.
    """
    generator, n = torch.Generator().manual_seed(_SEED), 0
    total = [torch.zeros((), dtype=torch.float64)] * len(net.weights)
    for batch in up_to(batches, most):

        def sums(batch: Any = batch) -> list[Tensor]:
            output, n = run_batch(net, batch, forward), rows(batch)
            return [drawn_sums(output, n, outputs, generator).sum() for _ in range(DRAWS)]

        total, n = [t + g / 2 for t, g in zip(total, _squares(net, sums), strict=True)], n + rows(batch)
    return [t / n for t in total]


def _squares(net: PlasticNet, run: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Return the mean over some sums of losses of the squares of entry times gradient, for each gated weight."""
    weights = [net.model.get_parameter(name) for name in net.weights]
    total = [torch.zeros(w.shape, dtype=torch.float64, device=w.device) for w in weights]
    with with_gradients_of(weights):
        sums = run()
        for s in sums:
            found = torch.autograd.grad(s, weights, materialize_grads=True, retain_graph=s is not sums[-1])
            for t, w, g in zip(total, weights, found, strict=True):
                t += (w.detach().double() * g.double()).square() / len(sums)
    return total
