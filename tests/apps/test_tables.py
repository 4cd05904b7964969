"""Tables as inputs: what is estimated comes from the training rows, and new rows are read in the same way."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch

from plasticnet import PlasticError
from plasticnet.apps.tables import Category, Number, Table, fit_table


def test_numbers_are_normalised_by_the_training_rows() -> None:
    table = fit_table({"a": ["1", "3", "100"], "b": ["5", "5", "5"]}, [0, 1])
    assert table.numbers == (Number("a", 2.0, 2.0, 1.0, False), Number("b", 5.0, 5.0, 1.0, False))
    assert table.tensor({"b": ["6"], "a": ["0"], "other": ["x"]}).tolist() == [[-2, 1]]


def test_gaps_in_numbers_are_filled_by_the_median_and_shown() -> None:
    table = fit_table({"a": ["0", "", "1", "?", "5"], "b": ["1", "2", "3", "4", "5"]}, range(5))
    found = table.tensor({"a": ["NA", "1", None], "b": ["3", "", "5"]})
    assert (table.numbers[0].median, table.numbers[0].mean) == (1, 2)
    torch.testing.assert_close(found[0], found[1] * torch.tensor([1, 0, 1]) + torch.tensor([0, 1, 0]))
    assert found[:, 1].tolist() == [1, 0, 1]
    assert found.shape == (3, 3)  # b had no gap in training, and its median fills the new one
    assert found[1, 2] == 0


def test_categories_are_zeros_and_ones() -> None:
    cells = ["red", "blue", "", "red", "green"]
    table = fit_table({"colour": cells}, [0, 1, 2, 3])
    assert table.categories == (Category("colour", ("blue", "red", None)),)
    columns = {"colour": ["red", "?", "green", " blue"]}
    assert table.tensor(columns).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert table.unknown(columns) == {"colour": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "no column beside the target"),
        ({"a": ["0,5", "1,25", "-3"]}, "'a' holds numbers with a comma, such as '0,5': write a point"),
        ({"a": ["1,234.5", "", "1,234,000"]}, "'a' holds numbers with a comma, such as '1,234.5'"),
        ({"a": ["", "?"]}, "'a' is empty in all training rows; --ignore a"),
        ({"a": ["1", "2", "x", "4"]}, r"numbers, and text in 1 of 4 rows, first 'x' in row 3.*--ignore a"),
        ({"a": ["1", "1e999"]}, "an infinite number, '1e999' in row 2"),
        ({"a": [f"name {i}" for i in range(80)]}, "'a' has 80 different texts in 80 training rows.*--ignore a"),
        ({"a": [datetime.date(2000, 1, 1)]}, "'a' holds date: columns hold numbers or text"),
    ],
)
def test_what_is_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(PlasticError, match=message):
        fit_table(columns, range(len(next(iter(columns.values()), ()))))


def test_new_rows_that_do_not_fit() -> None:
    table = Table((Number("a", 0.0, 0.0, 1.0, False),), ())
    with pytest.raises(PlasticError, match="'a' is missing; the columns are b"):
        table.tensor({"b": ["1"]})
    with pytest.raises(PlasticError, match="'a' holds text, and held numbers in training"):
        table.tensor({"a": ["x", "y"]})


def test_a_table_without_columns_has_no_inputs() -> None:
    with pytest.raises(PlasticError, match="there is no column"):
        Table((), ()).tensor({"a": [1]})
