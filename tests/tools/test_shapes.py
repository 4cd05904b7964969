"""Shapes that broadcast over those of other tensors."""

from __future__ import annotations

import pytest
import torch

from plasticnet.tools.shapes import along


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_vector_multiplies_along_one_dimension(rank: int) -> None:
    x = torch.randn(*[3] * rank)
    vector = torch.randn(3)
    for dim in range(rank):
        expected = (x.movedim(dim, -1) * vector).movedim(-1, dim)
        assert torch.equal(x * along(vector, dim, rank), expected)
        assert torch.equal(x * along(vector, dim - rank, rank), expected)


def test_a_matrix_multiplies_along_two() -> None:
    x, rows = torch.randn(2, 4, 3), torch.randn(2, 3)
    assert torch.equal(x * along(rows, (0, 2), 3), x * rows[:, None])
    assert torch.equal(x * along(rows, (0, -1), 3), x * rows[:, None])


def test_an_empty_vector() -> None:
    assert along(torch.ones(0), 1, 3).shape == (1, 0, 1)
