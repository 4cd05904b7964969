"""Finds out what a target asks for, turns it into numbers, and draws the rows for training, validation and test."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticnet.apps.data import Target, Task
from plasticnet.apps.tables import check_commas, is_gap
from plasticnet.errors import PlasticError

# Whole numbers are classes if they are so few, and fewer than this share of the rows.
_FEW, _SHARE = 20, 0.1
# The shares of validation and test.
_HELD_OUT = 0.15
_FEWEST = 3  # a class needs a row for each part
_ROWS = 20  # what a regression needs at least
_EXACT = 2.0**53  # from here on a floating number may stand for several whole ones


def read_target(values: Sequence[Any], name: str, asked: Task | None, whole: bool) -> tuple[Target, Tensor]:
    """Return what a target asks for, and its rows: the numbers of classes, or the numbers to be predicted.

    Text and booleans are classes. Whole numbers are, too, if there are at most 20 different ones, and fewer than a
    tenth of the rows. Everything else is a regression. A class is called what its cells say, as text: 01 and 1 are two
    classes. Where nobody has said that these are classes, they may be one number, and are refused.

    Args:
        values: The target of each row.
        name: How it is called.
        asked: The task that the user has named, or None.
        whole: Whether these are the rows of a run. Then there must be enough of them to be split.

    Returns:
        The target, whose mean and deviation are not known yet, and a tensor of shape (rows,).

    Raises:
        PlasticError: Rows have no target; it is always the same; a class is too rare; a number is written in several
            ways; or the task that was asked for does not fit.
    """
    if gaps := [row for row, value in enumerate(values) if is_gap(value)]:
        raise PlasticError(
            f"the target {name!r} is missing in {len(gaps)} of {len(values)} rows, first in row {gaps[0] + 1}: remove "
            "these rows"
        )
    numbers = _numbers(values)
    task = asked or _guess(values, numbers)
    if task == "regression":
        if numbers is None:
            raise PlasticError(f"--task regression: the target {name!r} holds text, such as {str(values[0])!r}")
        return Target(task, name), _regression(numbers, name, whole)
    if numbers is None and asked is None:
        _check_mixed(values, name)
    labels, codes, counts = np.unique(_names(values), return_inverse=True, return_counts=True)
    if numbers is not None and not _booleans(values):  # 10 comes after 9
        exact = [Decimal(label) for label in labels.tolist()]
        if asked is None:
            _check_one_writing(labels.tolist(), exact, name)
        order = np.asarray(sorted(range(len(exact)), key=exact.__getitem__), dtype=np.int64)
        labels, codes, counts = labels[order], np.argsort(order)[codes], counts[order]
    if whole:
        _check_classes(labels, counts, name, numbers is not None)
    return Target(task, name, tuple(map(str, labels))), torch.from_numpy(codes.astype(np.int64))


def split_rows(rows: int, classes: Tensor | None, seed: int) -> list[Tensor]:
    """Return the numbers of the rows for training, validation and test: 70, 15 and 15 % of them, at random.

    Args:
        rows: How many rows there are.
        classes: The class of each row, of which each part then has its share; or None.
        seed: The seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.arange(rows)] if classes is None else [(classes == c).nonzero()[:, 0] for c in classes.unique()]
    parts: list[list[Tensor]] = [[], [], []]
    for group in groups:
        held = max(1, round(_HELD_OUT * len(group)))
        drawn = group[torch.randperm(len(group), generator=generator)]
        for part, index in zip(parts, drawn.split([len(group) - 2 * held, held, held]), strict=True):
            part.append(index)
    joined = [torch.cat(part) for part in parts]
    return [part[torch.randperm(len(part), generator=generator)] for part in joined]


def _guess(values: Sequence[Any], numbers: np.ndarray | None) -> Task:
    """Return what a target asks for, by its values."""
    if numbers is None or _booleans(values):
        return "classification"
    whole = bool(np.isfinite(numbers).all() and (numbers == np.round(numbers)).all())
    most = min(_FEW, math.ceil(_SHARE * len(numbers)) - 1)
    # Large numbers that differ may be one as floating numbers, but not as text.
    few = whole and len(np.unique(numbers)) <= most and len(set(_names(values))) <= most
    return "classification" if few else "regression"


def _check_mixed(values: Sequence[Any], name: str) -> None:
    """Raise `PlasticError` where a target is text in a few rows, and many different numbers in the others.

    Numbers with commas are refused, too.
    """
    texts = [row for row, value in enumerate(values) if _numbers([value]) is None]
    check_commas(name, [values[row] for row in texts])
    if 2 * len(texts) < len(values) and len(set(values)) > _FEW:
        raise PlasticError(
            f"the target {name!r} holds numbers, and text in {len(texts)} of {len(values)} rows, first "
            f"{values[texts[0]]!r} in row {texts[0] + 1}: correct or remove these rows; or, if it holds names of "
            "classes, say --task classification"
        )


def _booleans(values: Sequence[Any]) -> bool:
    """Return whether the values are True and False."""
    return all(isinstance(value, bool | np.bool_) for value in values)


def _numbers(values: Sequence[Any]) -> np.ndarray | None:
    """Return the values as numbers, or None where one of them is not."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        return None


def _names(values: Sequence[Any]) -> list[str]:
    """Return what cells say, as text: the names of their classes."""
    if _booleans(values):
        return list(map(str, values))
    return [_name(value) for value in values]


def _name(value: Any) -> str:
    """Return what a cell says. Whole numbers whose column had gaps are floating ones, and lose the point again."""
    if isinstance(value, bool | np.bool_):  # among numbers
        return str(int(value))
    if isinstance(value, float | np.floating) and abs(value) < _EXACT and value == round(value):
        return str(round(value))
    return str(value).strip()


def _check_one_writing(labels: Sequence[str], exact: Sequence[Decimal], name: str) -> None:
    """Raise `PlasticError` where one number is written in several ways, which may be one class or several."""
    writings = defaultdict[Decimal, list[str]](list)
    for label, number in zip(labels, exact, strict=True):
        writings[number].append(label)
    if several := next((found for found in writings.values() if len(found) > 1), None):
        raise PlasticError(
            f"the target {name!r} has {' and '.join(map(repr, several))}, which are one number: if they are different "
            "classes, say --task classification; if not, write them alike"
        )


def _regression(numbers: np.ndarray, name: str, whole: bool) -> Tensor:
    """Return the numbers that are to be predicted."""
    if not np.isfinite(numbers).all():
        raise PlasticError(f"the target {name!r} is infinite in row {int(np.isinf(numbers).argmax()) + 1}")
    if whole and len(np.unique(numbers)) == 1:
        raise PlasticError(f"the target {name!r} is {numbers[0]:g} in all rows, so that there is nothing to learn")
    if whole and len(numbers) < _ROWS:
        raise PlasticError(
            f"there are {len(numbers)} rows, and a regression needs {_ROWS}; if the target {name!r} is a class, say so "
            "by --task classification"
        )
    return torch.from_numpy(numbers)


def _check_classes(labels: np.ndarray, counts: np.ndarray, name: str, numeric: bool) -> None:
    """Raise `PlasticError` where there are no two classes, or one of them is too rare to be in each part."""
    if len(labels) < 2:
        raise PlasticError(f"the target {name!r} is {labels[0]!s} in all rows, so that there is nothing to learn")
    rare = [f"{label!s} ({count})" for label, count in zip(labels, counts, strict=True) if count < _FEWEST]
    if rare:
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        way_out = ", or say --task regression" if numeric else ""
        raise PlasticError(
            f"classes of the target {name!r} have fewer than {_FEWEST} rows: {', '.join(rare[:5])}{more}; training, "
            f"validation and test need one each: join them with others, or remove their rows{way_out}"
        )
