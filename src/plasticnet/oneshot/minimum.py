"""Watches a loss that scores follow: whether it is finite, and whether it is more than rounding noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.learning.passes import run_closure
from plasticnet.learning.sampler import Pass
from plasticnet.net import PlasticNet
from plasticnet.tools.inputs import Loss

_SMALL = 1e-4  # losses above this are not asked about
_ROUNDING = 128  # so many units in the last place of a typical loss are rounding


class Watched:
    """A loss whose values are noted; it raises `PlasticError` when they are not finite.

    Args:
        net: The network.
        loss: A function without arguments that returns losses, shape (batch,), or their mean.
    """

    def __init__(self, net: PlasticNet, loss: Loss) -> None:
        self._net, self._loss = net, loss
        self._largest, self._eps = 0.0, 0.0

    def __call__(self) -> Tensor:
        f = self._loss()
        if isinstance(f, Tensor) and f.is_floating_point() and f.numel():
            largest = float(f.detach().abs().max())
            if not math.isfinite(largest):
                raise PlasticError(
                    "the loss that scores follow is not finite (NaN or infinite): look for such numbers in the inputs, "
                    "in the model's outputs on them, and in the weights"
                )
            self._largest = max(self._largest, largest)
            self._eps = torch.finfo(torch.promote_types(f.dtype, torch.float32)).eps
        return f

    def check(self) -> None:
        """Raise `PlasticError` if the losses were no more than rounding.

        What is rounding follows from the losses with every other unit closed. For these the loss is called once more,
        if the losses were very small.
        """
        if self._largest > _SMALL:
            return
        z = self._net.mean_gates()[0].clone()
        z[:-1:2] = 0.0
        now = Pass("probe", probe=lambda _: z.expand(1, -1), weights=self._net.mean_weights())
        with torch.no_grad():
            moved = float(run_closure(self._net, self._net.sampler, self._loss, now).abs().max())
        if self._largest <= _ROUNDING * self._eps * moved:
            raise PlasticError(
                f"the loss is at its minimum (at most {self._largest:.1g}), as that of a network that imitates itself, "
                "and so has no gradient but rounding noise; leave the loss out and give batches=[...] for targets that "
                "are drawn from the model's own outputs"
            )
