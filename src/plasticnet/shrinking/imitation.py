"""The loss of a network that imitates the outputs of a model, for which no labels are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.shrinking.finite import NotFinite
from plasticnet.tools.batches import Forward, run_batch
from plasticnet.tools.half import products_in_single
from plasticnet.tools.inputs import Outputs
from plasticnet.tools.outputs import check_finite_outputs, classes_of, counted

_TEMPERATURE = 2.0


class Imitation:
    """Compares outputs with those of a model: classes by their divergence, everything else by squared errors.

    Args:
        model: The model, in evaluation mode. It gets no gradient.
        forward: What runs a model on a batch, where its form does not fit.
        outputs: What counts in an output; None for all.
    """

    def __init__(self, model: nn.Module, forward: Forward | None, outputs: Outputs | None) -> None:
        self.model, self.forward, self.outputs = model, forward, outputs
        self._variances: list[float] = []

    def fit(self, batches: Iterable[Any]) -> None:
        """Measure the variance of every output, by which its squared errors are divided.

        Args:
            batches: The batches.

        Raises:
            PlasticError: An output that counts is NaN or infinite, so that nothing could be fitted to it.
        """
        sums: list[Tensor] = []
        with products_in_single(self.model):
            for place, batch in enumerate(batches, 1):
                wanted = self.wanted(batch)
                logits, tensors = classes_of(wanted, self.outputs), counted(wanted, self.outputs)
                compared = tensors if logits is None else [logits]
                check_finite_outputs(compared, f"batch {place} of those that scores are taken on")
                for i, y in enumerate(tensors):
                    moments = torch.stack(
                        [t.double().sum().cpu() for t in (torch.ones_like(y), y, y.double().square())]
                    )
                    sums[i : i + 1] = [sums[i] + moments if i < len(sums) else moments]
        self._variances = [max(float(s / n - (m / n) ** 2), 1e-30) for n, m, s in sums]

    @torch.no_grad()
    def wanted(self, batch: Any) -> Any:
        """Return what the model returns for a batch."""
        return run_batch(self.model, batch, self.forward)

    def losses(self, output: Any, wanted: Any, temperature: float = _TEMPERATURE) -> Tensor:
        """Return the losses of samples, shape (batch,), or their mean where outputs are of other lengths.

        Where the output, or its ``logits``, has the shape (batch, classes), the loss is the Kullback-Leibler divergence
        of the class probabilities, times the square of the temperature (Hinton et al., arXiv 1503.02531, section 2).
        Else it is the mean over the tensors of their squared errors, each divided by the variance of the model's.

        Args:
            output: What the network has returned.
            wanted: What the model has returned for the same batch.
            temperature: What logits are divided by.
        """
        logits, teacher = classes_of(output, self.outputs), classes_of(wanted, self.outputs)
        if logits is not None and teacher is not None:
            own, other = (F.log_softmax(t.float() / temperature, 1) for t in (logits, teacher))
            return F.kl_div(own, other, reduction="none", log_target=True).sum(1) * temperature**2
        own, other = counted(output, self.outputs), counted(wanted, self.outputs)
        if [t.shape for t in own] != [t.shape for t in other]:
            raise PlasticError(
                f"the network returns tensors of the shapes {_shapes(own)} in training, and {_shapes(other)} are what "
                "it should imitate; loss=... says what is trained on, or outputs=... what counts"
            )
        pairs = zip(own, other, self._variances, strict=True)
        errors = [(a.float() - b.float()).square() / v for a, b, v in pairs]
        if len({len(e) for e in errors}) == 1:
            return torch.stack([e.flatten(1).mean(1) if e.dim() > 1 else e for e in errors]).mean(0)
        return torch.stack([e.mean() for e in errors]).mean()

    @torch.no_grad()
    def divergence(self, network: nn.Module, batches: Iterable[Any]) -> float:
        """Return the mean loss of a network over batches, at a temperature of 1.

        Args:
            network: The network, in evaluation mode.
            batches: The batches.

        Raises:
            NotFinite: The mean is NaN.
        """
        total, n = 0.0, 0
        with products_in_single(self.model):
            for batch in batches:
                found = self.losses(run_batch(network, batch, self.forward), self.wanted(batch), temperature=1.0)
                total, n = total + float(found.sum()), n + found.numel()
        if math.isnan(total):
            raise NotFinite(
                "the outputs on the inputs that are held out are NaN or infinite: look for such numbers in the inputs "
                "and in the weights; outputs=... says what counts"
            )
        return total / n


def _shapes(tensors: list[Tensor]) -> str:
    """Return the shapes of tensors."""
    return ", ".join(str(tuple(t.shape)) for t in tensors)
