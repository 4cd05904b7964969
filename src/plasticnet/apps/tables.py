"""Turns the columns of a table into inputs: numbers are normalised, categories become columns of zeros and ones.

Everything that is estimated for it comes from the training rows, and is kept, so that new rows can be turned into
inputs in the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticnet.errors import PlasticError

Columns = Mapping[str, Sequence[Any]]  # the cells of a table by column: text, numbers, booleans or None

_COMMA = re.compile(r"[+-]?(\d+,\d+|\d{1,3}(,\d{3})+(\.\d+)?)")  # 0,5 or 1,234.5
_GAPS = ("", "?", "na", "n/a", "nan", "null")
# A column of text with more different values than this, and than this share of its rows, has names or keys in it.
_MANY, _SHARE = 50, 0.1


@dataclass(frozen=True)
class Number:
    """A column of numbers.

    Attributes:
        name: Its name.
        median: What fills its gaps.
        mean: What is subtracted.
        deviation: What it is then divided by.
        gaps: Whether another input says where there was a gap.
    """

    name: str
    median: float
    mean: float
    deviation: float
    gaps: bool


@dataclass(frozen=True)
class Category:
    """A column of text, which becomes an input for each of its values.

    Attributes:
        name: Its name.
        values: The values. None stands for a gap.
    """

    name: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class Table:
    """How the columns of a table become inputs: first those of numbers, and then those of text.

    Attributes:
        numbers: The columns of numbers.
        categories: The columns of text.
    """

    numbers: tuple[Number, ...]
    categories: tuple[Category, ...]

    def tensor(self, columns: Columns) -> Tensor:
        """Return the rows of a table as inputs, shape (rows, inputs).

        A value of a category that the training rows did not have gives zeros only. Columns that are not known are left
        out.

        Raises:
            PlasticError: A column is missing, or holds text where numbers are expected, or a number that is too large.
        """
        names = [c.name for c in (*self.numbers, *self.categories)]
        if not names:
            raise PlasticError("there is no column that could be an input")
        if missing := [n for n in names if n not in columns]:
            raise PlasticError(f"the column {missing[0]!r} is missing; the columns are {', '.join(columns)}")
        found: list[np.ndarray] = []
        for column in self.numbers:
            values = numbers_of(column.name, columns[column.name])
            if values is None:
                raise PlasticError(f"the column {column.name!r} holds text, and held numbers in training")
            empty = np.isnan(values)
            filled = np.where(empty, column.median, values)
            found.append(_single(column.name, filled, column.mean, column.deviation))
            if column.gaps:
                found.append(empty)
        for column in self.categories:
            cells = _texts(columns[column.name])
            found += [np.array([cell == value for cell in cells]) for value in column.values]
        return torch.from_numpy(np.stack([f.astype(np.float32) for f in found], 1))

    def unknown(self, columns: Columns) -> dict[str, int]:
        """Return how many cells of a table have a value that the training rows did not have, by column."""
        found = {c.name: sum(v not in c.values for v in _texts(columns[c.name])) for c in self.categories}
        return {name: count for name, count in found.items() if count}


def fit_table(columns: Columns, training: Sequence[int]) -> Table:
    """Return how the columns of a table become inputs.

    A column holds numbers if all of its cells do that are no gaps, and categories otherwise. Gaps are cells that are
    empty or hold ``?``, ``NA``, ``N/A``, ``NaN`` or ``null``.

    Args:
        columns: The columns, without the target.
        training: The numbers of the training rows.

    Raises:
        PlasticError: There is no column; one is empty, or holds numbers and text, or text like names and keys.
    """
    if not columns:
        raise PlasticError("there is no column beside the target")
    numbers, categories = list[Number](), list[Category]()
    for name, cells in columns.items():
        values = numbers_of(name, cells)
        if values is None:
            categories.append(_category(name, [cells[row] for row in training]))
        else:
            numbers.append(_number(name, values[np.asarray(training)]))
    return Table(tuple(numbers), tuple(categories))


def plain_numbers(columns: Columns) -> Tensor:
    """Return columns of numbers as they are, shape (rows, columns).

    Raises:
        PlasticError: There is no column, or one holds something other than numbers, or has gaps.
    """
    found = []
    for name, cells in columns.items():
        values = numbers_of(name, cells)
        if values is None or np.isnan(values).any():
            what = "does not hold numbers only" if values is None else "has gaps"
            raise PlasticError(
                f"the column {name!r} {what}: --target names what is to be predicted, --ignore what is to be left out, "
                "and --like the folder of the run of train whose preparation is to be used"
            )
        found.append(_single(name, values))
    if not found:
        raise PlasticError("there is no column beside the target")
    return torch.from_numpy(np.stack(found, 1))


def is_gap(cell: Any) -> bool:
    """Return whether a cell has nothing in it."""
    if isinstance(cell, str):
        return cell.strip().lower() in _GAPS
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def numbers_of(name: str, cells: Sequence[Any]) -> np.ndarray | None:
    """Return the numbers in a column, with NaN for gaps, shape (rows,); or None where the column holds text.

    Raises:
        PlasticError: The column holds something else, or infinite numbers, or text among numbers.
    """
    found = np.full(len(cells), np.nan)
    texts = list[int]()
    for row, cell in enumerate(cells):
        if is_gap(cell):
            continue
        if not isinstance(cell, str | int | float | bool | Decimal | np.generic):
            raise PlasticError(
                f"the column {name!r} holds {type(cell).__name__}: columns hold numbers or text; --ignore leaves it out"
            )
        try:
            found[row] = float(cell)
        except ValueError:
            texts.append(row)
    present = sum(not is_gap(cell) for cell in cells) if texts else 0
    if texts and 2 * len(texts) > present:
        check_commas(name, [cells[row] for row in texts])
        return None
    if texts:
        raise PlasticError(
            f"the column {name!r} holds numbers, and text in {len(texts)} of {len(cells)} rows, first "
            f"{cells[texts[0]]!r} in row {texts[0] + 1}: correct these, leave them empty where the number is not "
            f"known, or train without the column, by --ignore {name}"
        )
    if np.isinf(found).any():
        row = int(np.isinf(found).argmax())
        raise PlasticError(f"the column {name!r} holds an infinite number, {cells[row]!r} in row {row + 1}")
    return found


def _single(name: str, values: np.ndarray, mean: float = 0.0, deviation: float = 1.0) -> np.ndarray:
    """Return the normalised numbers of a column in single precision. Raises `PlasticError` where one is too large."""
    with np.errstate(over="ignore"):
        found = ((values - mean) / deviation).astype(np.float32)
    if not np.isfinite(found).all():
        row = int((~np.isfinite(found)).argmax())
        raise PlasticError(
            f"the column {name!r} holds {values[row]:g} in row {row + 1}, which is too large beside the others: "
            "correct it, or leave it empty"
        )
    return found


def check_commas(name: str, texts: Sequence[Any]) -> None:
    """Raise `PlasticError` where all texts of a column are numbers with commas, which are not names of anything."""
    if all(_COMMA.fullmatch(str(text).strip()) for text in texts):
        raise PlasticError(
            f"the column {name!r} holds numbers with a comma, such as {texts[0]!r}: write a point before the decimals, "
            "and nothing between thousands"
        )


def _number(name: str, values: np.ndarray) -> Number:
    """Return how a column of numbers becomes inputs, from its training rows."""
    present = values[~np.isnan(values)]
    if not len(present):
        raise PlasticError(f"the column {name!r} is empty in all training rows; --ignore {name} leaves it out")
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = float(present.mean()), float(present.std())
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        raise PlasticError(
            f"the column {name!r} holds {present[np.abs(present).argmax()]:g}, too large a number: correct it, leave "
            f"it empty, or train without the column, by --ignore {name}"
        )
    constant = deviation <= 1e-12 * max(abs(mean), 1.0)
    return Number(name, float(np.median(present)), mean, 1.0 if constant else deviation, len(present) < len(values))


def _category(name: str, cells: Sequence[Any]) -> Category:
    """Return how a column of text becomes inputs, from its training rows."""
    texts = _texts(cells)
    values: list[str | None] = [*sorted({text for text in texts if text is not None})]
    if len(values) > max(_MANY, _SHARE * len(texts)):
        raise PlasticError(
            f"the column {name!r} has {len(values):,} different texts in {len(texts):,} training rows, as names and "
            f"keys have: leave it out by --ignore {name}"
        )
    return Category(name, tuple([*values, None] if None in texts else values))


def _texts(cells: Sequence[Any]) -> list[str | None]:
    """Return cells as text, with None for gaps."""
    return [None if is_gap(cell) else str(cell).strip() for cell in cells]
