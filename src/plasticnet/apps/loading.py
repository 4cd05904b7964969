"""Loads any data for the command line: split for training, as a few examples, or in batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticnet.apps.bounds import check_count
from plasticnet.apps.data import DATASETS, Data, Split, Target, load_data
from plasticnet.apps.own_data import Found, Reading, call, check_options, is_pair, joined, read
from plasticnet.apps.tables import Table, fit_table, plain_numbers
from plasticnet.apps.targets import read_target, split_rows
from plasticnet.errors import PlasticError
from plasticnet.tools.batches import check_batches


def load_any(source: str, how: Reading, seed: int = 0) -> Data:
    """Read data with targets, and split them for training, validation and test.

    Args:
        source: Where the data are; `KNOWN` lists the forms.
        how: How they are read.
        seed: The seed of the split.

    Raises:
        PlasticError: There are no such data, they cannot be read, or have no targets; or a package is missing.
    """
    if source in DATASETS:
        check_options(source, how, ())
        if how.task == "regression":
            raise PlasticError(f"--task regression: {source} are classes")
        return load_data(source, how.data_dir, seed)
    found = read(source, how)
    if found.y is None:
        raise PlasticError(
            f"--data {source}: it has no targets. A table needs --target COLUMN, a .npz file an array y, images a "
            "folder for each class, and a function returns (x, y)"
        )
    try:
        target, y = read_target(found.y, found.target, how.task or found.task, whole=True)
        parts = split_rows(len(y), y if target.task == "classification" else None, seed)
        if isinstance(found.x, Tensor):
            table, x = None, found.x
        else:
            table = fit_table(found.x, parts[0].tolist())
            x = table.tensor(found.x)
        if target.task == "regression":
            target, y = _normalised(target, y, parts[0], x.dtype)
    except PlasticError as error:
        raise PlasticError(f"--data {source}: {error}") from error
    train, val, test = (Split(x[part], y[part]) for part in parts)
    return Data(train, val, test, target, table)


def example_of(source: str, how: Reading) -> tuple[Tensor, int | None]:
    """Return the first two inputs of data, and how many outputs a network for them has, or None without targets.

    Args:
        source: Where the data are; `KNOWN` lists the forms.
        how: How they are read.

    Raises:
        PlasticError: There are no such data, or they cannot be read.
    """
    found = None if source in DATASETS else read(source, how)
    if found is not None and found.y is None:
        if isinstance(found.x, Tensor):
            return found.x[:2], None
        rows = range(len(next(iter(found.x.values()), ())))
        return fit_table(found.x, rows).tensor(found.x)[:2], None
    data = load_any(source, how)
    return data.train.x[:2], data.outputs


def _normalised(target: Target, y: Tensor, training: Tensor, dtype: torch.dtype) -> tuple[Target, Tensor]:
    """Return the target of a regression with its mean and deviation in training, and the normalised numbers."""
    mean, deviation = float(y[training].mean()), float(y[training].std(correction=0)) or 1.0
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        raise PlasticError(f"the target {target.name!r} holds {float(y.abs().max()):g}, which is too large a number")
    kind = dtype if dtype.is_floating_point else torch.float32
    return Target(target.task, target.name, (), mean, deviation), ((y - mean) / deviation).to(kind)


def read_batches(
    source: str, how: Reading, batch: int = 64, table: Table | None = None, target: Target | None = None
) -> Iterable[Any]:
    """Return batches of data: of inputs, or pairs of inputs and targets. All rows are in them.

    Args:
        source: Where the data are; `KNOWN` lists the forms.
        how: How they are read.
        batch: The number of rows in a batch, except where a function makes them.
        table: How the columns of a table become inputs. Without it they are numbers, and stay as they are.
        target: The target of the run that ``table`` is from, if there is one.

    Raises:
        PlasticError: There are no such data, they cannot be read, or a package for it is missing.
    """
    check_count(f"--batch {batch}", batch)
    if source in DATASETS:
        train = load_any(source, how).train
        return _batches(train.x, train.y, batch)
    package, _, function = source.partition(":")
    if function and not Path(source).exists():
        check_options(source, how, ())
        returned = call(source, package, function)
        if not is_pair(returned):
            check_batches(returned)
            return returned
        found = joined(source, returned)
    else:
        found = read(source, how)
    try:
        if isinstance(found.x, Tensor):
            x = found.x
        else:
            x = plain_numbers(found.x) if table is None else table.tensor(found.x)
        y = None if found.y is None else _targets(found, how, target)
    except PlasticError as error:
        raise PlasticError(f"--data {source}: {error}") from error
    return _batches(x, y, batch)


def _targets(found: Found, how: Reading, target: Target | None) -> Tensor:
    """Return the targets as numbers: in the way of a run, or the numbers of classes, or plain numbers."""
    assert found.y is not None
    if target is None:
        return _classes(found.y)
    own, y = read_target(found.y, found.target, target.task, whole=False)
    if target.task == "regression":
        return ((y - target.mean) / target.deviation).float()
    if unknown := sorted(set(own.labels) - set(target.labels)):
        raise PlasticError(f"--like: the run has no class {unknown[0]!r}, only {', '.join(target.labels)}")
    return torch.tensor([target.labels.index(label) for label in own.labels])[y]


def _classes(values: Sequence[Any]) -> Tensor:
    """Return targets as they are told without a run: whole numbers and names as classes, other numbers as they are."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        return torch.from_numpy(np.unique(np.asarray(values, dtype=str), return_inverse=True)[1])
    if np.isinf(numbers).any():
        raise PlasticError(f"the target is infinite in row {int(np.isinf(numbers).argmax()) + 1}")
    whole = bool((numbers == np.round(numbers)).all())
    return torch.from_numpy(numbers.astype(np.int64) if whole else numbers.astype(np.float32))


def _batches(x: Tensor, y: Tensor | None, batch: int) -> list[Any]:
    """Return the rows in batches."""
    return list(x.split(batch)) if y is None else list(zip(x.split(batch), y.split(batch), strict=True))
