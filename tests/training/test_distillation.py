"""Distillation: the loss of the paper, its limits, and shapes that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from plasticnet import PlasticError, distillation


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True), torch.arange(5) % 3


def test_it_is_the_weighted_sum_of_divergence_and_cross_entropy() -> None:
    student, teacher, labels = batch()
    found = distillation(student, teacher, labels, temperature=3.0, weight=0.7)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    soft = (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(found, 0.7 * 9 * soft + 0.3 * F.cross_entropy(student, labels, reduction="none"))
    assert found.shape == (5,)


def test_the_ends_of_the_weight() -> None:
    student, teacher, labels = batch()
    hard = distillation(student, teacher, labels, weight=0.0)
    torch.testing.assert_close(hard, F.cross_entropy(student, labels, reduction="none"))
    torch.testing.assert_close(distillation(student, student, labels, weight=1.0), torch.zeros(5), atol=1e-6, rtol=0)


def test_gradients_keep_their_scale_at_high_temperatures_and_none_goes_to_the_teacher() -> None:
    """Towards infinity the gradient is that of the squared difference of centred logits, over classes (the paper,
    section 2.1)."""
    student, teacher, labels = batch()
    distillation(student, teacher, labels, temperature=1e4, weight=1.0).sum().backward()
    assert teacher.grad is None
    gap = (student - teacher).detach()
    torch.testing.assert_close(student.grad, (gap - gap.mean(1, keepdim=True)) / 3, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_logits": torch.zeros(5, 4)}, r"\(5, 4\)"),
        ({"teacher_logits": torch.zeros(1, 3)}, r"\(1, 3\)"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"\(4,\)"),
        ({"labels": torch.zeros(5, 3)}, r"\(5, 3\)"),
        ({"labels": torch.zeros(5)}, "whole numbers"),
        ({"logits": torch.zeros(5)}, "needed are"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"weight": 1.5}, "weight=1.5"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    student, teacher, labels = batch()
    with pytest.raises(PlasticError, match=message):
        distillation(**{"logits": student, "teacher_logits": teacher, "labels": labels, **change})
