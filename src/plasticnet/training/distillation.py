"""Distillation: a network learns from the outputs of a larger one as well as from the labels."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from plasticnet.errors import PlasticError


def distillation(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 4.0, weight: float = 0.9
) -> Tensor:
    """Return the losses of samples for a student that imitates a teacher (Hinton et al., arXiv 1503.02531, section 2).

    The loss of a sample has two parts. The first is the Kullback-Leibler divergence of the student's class
    probabilities from the teacher's, both at ``temperature``. It is multiplied by the square of the temperature, which
    keeps the scale of its gradients, and by ``weight``. The second is the cross-entropy with the label, multiplied by
    ``1 - weight``.

    Args:
        logits: The outputs of the student, shape (batch, classes).
        teacher_logits: The outputs of the teacher, of the same shape. They get no gradient.
        labels: The class indices, shape (batch,).
        temperature: What both logits are divided by before the softmax; a number above 0.
        weight: The share of the teacher in the loss, from 0 to 1.

    Returns:
        The losses, shape (batch,), as `PlasticNet.expected_loss` needs them.

    Raises:
        PlasticError: The shapes do not fit, the labels are not integers, a label is not the index of a class (which is
            not checked on a GPU), or the temperature or the weight is out of range.

    Example:
        >>> import torch, plasticnet as pn
        >>> student, teacher = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
        >>> losses = pn.distillation(student, teacher, torch.tensor([0, 2]), weight=1.0)
        >>> losses.tolist()
        [0.0, 0.0]
    """
    shapes = tuple(tuple(t.shape) for t in (logits, teacher_logits, labels))
    if logits.dim() != 2 or shapes[1] != shapes[0] or shapes[2] != shapes[0][:1]:
        raise PlasticError(
            f"distillation: logits of shape {shapes[0]}, the teacher's of {shapes[1]} and labels of {shapes[2]}; "
            "needed are (batch, classes), the same again, and (batch,)"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise PlasticError(f"distillation: labels are class indices, whole numbers, not {labels.dtype}")
    if labels.numel() and not labels.is_cuda and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise PlasticError(f"distillation: labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")
    if not 0 < temperature < math.inf or not 0 <= weight <= 1:
        raise PlasticError(
            f"distillation: temperature={temperature}, weight={weight}: a number above 0, and one from 0 to 1"
        )
    student = F.log_softmax(logits / temperature, 1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, 1)
    soft = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    hard = F.cross_entropy(logits, labels.long(), reduction="none")
    return weight * temperature**2 * soft + (1 - weight) * hard
