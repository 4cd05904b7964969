"""Distillation: a network learns from the outputs of a larger one beside the labels."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from plasticnet.errors import PlasticError


def distillation(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 4.0, weight: float = 0.9
) -> Tensor:
    """The losses of the samples, shape (batch,), when a student imitates a teacher (Hinton et al., arXiv 1503.02531).

    ``weight`` times the divergence of the student's softened classes from the teacher's (Kullback-Leibler, at this
    ``temperature``, times its square, so that gradients keep their scale), and the rest of the weight on the
    cross-entropy with the ``labels``, class indices of shape (batch,). Both logits have shape (batch, classes); no
    gradient goes to the teacher.

    Raises `PlasticError` when shapes do not fit, the labels are no indices, or the temperature or the weight is out
    of range.
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
