"""Losses and scores of classes and of numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from plasticnet import PlasticError
from plasticnet.apps.data import Split
from plasticnet.apps.scores import evaluate, losses, shown


def test_a_regression_is_scored_by_what_it_explains() -> None:
    y = torch.tensor([0.0, 1.0, 2.0, 5.0])
    found = y[:, None] + torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    loss, score = evaluate(nn.Identity(), Split(found, y), "regression", batch=3)
    assert loss == pytest.approx(0.25)
    assert score == pytest.approx(1 - 2 / 14)
    assert evaluate(nn.Identity(), Split(found, y), "regression").error == pytest.approx(math.sqrt(0.5))
    assert losses(found, y, "regression").tolist() == [0.5, 0.5, 0, 0]
    assert shown(score, "regression") == "R² 0.8571"


def test_a_target_that_is_the_same_everywhere() -> None:
    y = torch.ones(3)
    assert evaluate(nn.Identity(), Split(y[:, None], y), "regression").score == 1
    assert evaluate(nn.Identity(), Split(0 * y[:, None], y), "regression").score == 0


def test_a_model_that_returns_something_else() -> None:
    with pytest.raises(PlasticError, match="returns a tuple, and a tensor of outputs is needed"):
        losses((torch.ones(1),), torch.ones(1), "regression")  # pyright: ignore[reportArgumentType]


def test_classes_are_scored_by_how_many_are_right() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    loss, score = evaluate(nn.Identity(), Split(logits, torch.tensor([0, 1, 1])))
    assert score == pytest.approx(2 / 3)
    assert loss == pytest.approx((2 * math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 3)
    assert shown(score, "classification") == "66.67 %"
