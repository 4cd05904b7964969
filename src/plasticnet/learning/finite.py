"""Refuses losses and logits that are not finite, without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.learning.sampler import Sampler


def check_loss(sampler: Sampler, f: Tensor) -> None:
    """Raise `PlasticError` when a loss is not finite."""
    _check(sampler, f, lambda: "the loss is not finite (NaN or infinite); lower the learning rate or check the data")


def check_logits(net: GatedModel, sampler: Sampler) -> None:
    """Raise `PlasticError` when a logit is NaN or infinite."""

    def which() -> str:
        names = [g.name for g in net.all_gates() if not bool(torch.isfinite(g.phi.detach()).all())]
        return f"{names[0] if names else '(a site)'!r}: its gates are not finite; go back to a checkpoint"

    _check(sampler, net.phi().detach(), which)


def _check(sampler: Sampler, t: Tensor, problem: Callable[[], str]) -> None:
    """Raise `PlasticError` when a tensor is not finite.

    A GPU is not waited for: its answer is read when it has arrived, at one of the next calls.

    Args:
        sampler: It keeps the answers that have not arrived.
        t: The tensor.
        problem: Gives the message of the error.
    """
    finite = torch.isfinite(t).all()
    answers = [(finite, problem)]
    if t.is_cuda:
        come, answer = torch.cuda.Event(), torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(finite, non_blocking=True)
        come.record()
        sampler.owed.append((come, answer, problem))
        answers = []
        while sampler.owed and sampler.owed[0][0].query():
            answers.append(sampler.owed.pop(0)[1:])
    for answer, message in answers:
        if not answer:
            sampler.owed.clear()
            raise PlasticError(message())
