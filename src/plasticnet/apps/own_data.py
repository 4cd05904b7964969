"""Reads the user's own data for the command line: tables, arrays, images, or what a function returns."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticnet.apps.bounds import check_count, check_finite
from plasticnet.apps.columns import read_csv, read_parquet
from plasticnet.apps.data import DATASETS, Task
from plasticnet.apps.images import Pixels, encoded, image_folder, images_in
from plasticnet.apps.tables import Columns
from plasticnet.errors import PlasticError
from plasticnet.tools.batches import check_batches

KNOWN = (
    f"{', '.join(DATASETS)}, a .csv or .parquet table, a .npz file with the arrays x and y, a folder with a folder of "
    "images for each class, a .parquet file with images, or PACKAGE:FUNCTION that returns (x, y) or batches"
)
_LARGEST = 10_000  # the most rows and columns that images are brought to
_LABELS = ("label", "labels", "y")  # how the classes of images in a table are called if nobody says


@dataclass(frozen=True)
class Reading:
    """How data are read.

    Attributes:
        target: The column of a table that holds what is to be predicted, or None.
        task: What kind of answer that is, or None, which leaves it to the values.
        ignore: The columns of a table to leave out.
        image_size: The height and width that images are brought to, or None where they have one size.
        channels: 1 makes images grey and 3 coloured; None leaves them as they are.
        mean: What is subtracted from pixels between 0 and 1.
        std: What they are then divided by.
        data_dir: The folder that holds MNIST or Fashion-MNIST.

    Raises:
        PlasticError: A number or the task is out of range.
    """

    target: str | None = None
    task: Task | None = None
    ignore: tuple[str, ...] = ()
    image_size: int | None = None
    channels: int | None = None
    mean: float = 0.0
    std: float = 1.0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_count(f"--image-size {self.image_size}", self.image_size, _LARGEST)
        for option, value in (("--mean", self.mean), ("--std", self.std)):
            check_finite(f"{option} {value}", value)
        if not self.std > 0:
            raise PlasticError(f"--std {self.std}: it must be a number above 0")
        if self.channels not in (None, 1, 3):
            raise PlasticError(f"--channels {self.channels}: 1 for grey, or 3 for colour")
        if self.task not in (None, "classification", "regression"):
            raise PlasticError(f"--task {self.task}: classification or regression")

    @property
    def pixels(self) -> Pixels:
        """How images are read."""
        return Pixels(self.image_size, self.channels, self.mean, self.std)


@dataclass(frozen=True)
class Found:
    """What was read, before it becomes inputs and targets.

    Attributes:
        x: The inputs, or the columns of a table that are inputs.
        y: The target of each row, or None.
        target: How the target is called.
        task: What kind of answer it is, where the source says it.
        files: The path of each row in the folder, where the rows are files.
    """

    x: Tensor | Columns
    y: Sequence[Any] | None
    target: str = "y"
    task: Task | None = None
    files: Sequence[str] | None = None


def read(source: str, how: Reading) -> Found:
    """Read data that lie in files or come from a function.

    Args:
        source: Where the data are; one of `KNOWN` without the data sets that have a name.
        how: How they are read.

    Raises:
        PlasticError: There are no such data, or they cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        check_options(source, how, ("image_size", "channels", "mean", "std"))
        x, names, files = image_folder(path, how.pixels)
        return Found(x, names, "the name of the folder", None if names is None else "classification", files)
    if path.suffix in (".npz", ".csv", ".parquet") and not path.is_file():
        raise PlasticError(f"--data {source}: there is no such file")
    if path.suffix == ".npz":
        check_options(source, how, ())
        return _arrays(path)
    if path.suffix in (".csv", ".parquet"):
        return _table(path, how)
    package, _, function = source.partition(":")
    if function and not path.exists():
        check_options(source, how, ())
        return joined(source, call(source, package, function))
    if not path.exists():
        raise PlasticError(f"--data {source}: there is no such file or folder; give {KNOWN}")
    raise PlasticError(f"--data {source}: give {KNOWN}")


def check_options(source: str, how: Reading, used: Sequence[str]) -> None:
    """Raise `PlasticError` where an option was given that says nothing about these data."""
    usual = Reading()
    for name in ("target", "ignore", "image_size", "channels", "mean", "std"):
        if name not in used and getattr(how, name) != getattr(usual, name):
            raise PlasticError(f"--{name.replace('_', '-')} says nothing about --data {source}: leave it out")


def _table(path: Path, how: Reading) -> Found:
    """Read a table, or images that lie in one."""
    columns = read_csv(path) if path.suffix == ".csv" else read_parquet(path)
    for option, names in (("--target", (how.target,) if how.target else ()), ("--ignore", how.ignore)):
        if missing := [name for name in names if name not in columns]:
            raise PlasticError(
                f"--data {path}: {option} {missing[0]}: there is no such column, only {', '.join(columns)}; the first "
                "line of a .csv table has the names"
            )
    images = [name for name, cells in columns.items() if encoded(cells[0]) is not None]
    if images:
        target = how.target or next((n for n in columns if n in _LABELS), None)
        check_options(str(path), how, ("target", "ignore", "image_size", "channels", "mean", "std"))
        y = None if target is None else columns[target]
        return Found(images_in(path, columns[images[0]], how.pixels), y, target or "y")
    check_options(str(path), how, ("target", "ignore"))
    inputs = {name: cells for name, cells in columns.items() if name != how.target and name not in how.ignore}
    return Found(inputs, None if how.target is None else columns[how.target], how.target or "y")


def _arrays(path: Path) -> Found:
    """Read the arrays x and y of a file of numpy; a single array is x whatever its name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict[str, np.ndarray]()
            for name in file.files:
                try:
                    arrays[name] = file[name]
                except ValueError as error:
                    raise PlasticError(
                        f"--data {path}: the array {name} is damaged, or holds objects of Python, which are not read "
                        "(allow_pickle): save arrays of numbers or of text"
                    ) from error
    except PlasticError:
        raise
    except Exception as error:  # a damaged archive can make numpy, zipfile and zlib raise anything
        raise PlasticError(f"--data {path}: it is no .npz file of numpy, or damaged: {error}") from error
    if "x" not in arrays and len(arrays) == 1:
        arrays = {"x": next(iter(arrays.values()))}
    if "x" not in arrays:
        raise PlasticError(f"--data {path}: it has the arrays {', '.join(arrays)}; the inputs must be named x")
    return _pair(str(path), arrays["x"], arrays.get("y"))


def _pair(source: str, x: Any, y: Any) -> Found:
    """Return arrays or tensors of inputs and targets."""
    x, y = _array(source, "x", x), None if y is None else _array(source, "y", y)
    if x.dtype.kind not in "biuf":
        raise PlasticError(f"--data {source}: x does not hold numbers")
    if not x.ndim:
        raise PlasticError(f"--data {source}: x is a single number, and has no rows")
    if not len(x):
        raise PlasticError(f"--data {source}: there is not a single input in it")
    if y is not None and (y.ndim == 0 or len(y) != len(x)):
        raise PlasticError(f"--data {source}: x has {len(x)} rows, and y has {len(y) if y.ndim else 'none'}")
    if y is not None and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y is not None and y.ndim > 1:
        raise PlasticError(f"--data {source}: y has the shape {y.shape}; one target for each row is needed")
    inputs = torch.from_numpy(np.ascontiguousarray(x))
    return Found(inputs.float() if inputs.dtype == torch.float64 else inputs, None if y is None else y.tolist())


def _array(source: str, name: str, values: Any) -> np.ndarray:
    """Return an array or a tensor as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise PlasticError(f"--data {source}: {name} is a {type(values).__name__}, not a tensor or an array")
    return values


def call(source: str, package: str, function: str) -> Any:
    """Return what a function returns. Raises `PlasticError` where it cannot be called."""
    try:
        return getattr(importlib.import_module(package), function)()
    except Exception as error:  # the function can raise anything
        raise PlasticError(f"--data {source}: {type(error).__name__}: {error}") from error


def is_pair(returned: Any) -> bool:
    """Return whether a function has returned all inputs and their targets: a tuple of two arrays or tensors."""
    whole = isinstance(returned, tuple) and len(returned) == 2
    return whole and all(isinstance(part, Tensor | np.ndarray) for part in returned)


def joined(source: str, returned: Any) -> Found:
    """Return what a function returned, which is a pair of inputs and targets, or batches, whose rows are joined."""
    if is_pair(returned):
        return _pair(source, *returned)
    check_batches(returned)
    batches = list(returned)
    if not batches:
        raise PlasticError(f"--data {source}: there is not a single batch in it")
    pairs: list[Any] = [
        batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None) for batch in batches
    ]
    if not all(isinstance(part, Tensor) or part is None for pair in pairs for part in pair):
        raise PlasticError(f"--data {source}: batches are tensors of inputs, or pairs (inputs, targets) of tensors")
    try:
        x = torch.cat([pair[0] for pair in pairs])
        y = None if pairs[0][1] is None else torch.cat([pair[1] for pair in pairs])
    except (RuntimeError, TypeError) as error:
        raise PlasticError(f"--data {source}: the batches cannot be joined: {error}") from error
    return _pair(source, x, y)
