"""Reads the user's own data for the command line: tables, arrays, images, or what a function returns."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticnet.apps.data import DATASETS, load_data
from plasticnet.errors import PlasticError
from plasticnet.tools.batches import check_batches

KNOWN = (
    "PACKAGE:FUNCTION that returns batches, a folder with a folder of images for each class, a .npz file with the "
    "arrays x and y, a .csv or .parquet table, a .parquet file with images, or one of " + ", ".join(DATASETS)
)
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Reading:
    """How data are read.

    Attributes:
        batch: The number of inputs in a batch.
        target: The column of a table that holds what is to be predicted, or None.
        size: The height and width that images are brought to, or None where they have one size.
        mean: What is subtracted from pixels between 0 and 1.
        std: What they are then divided by.
        data_dir: The folder that holds MNIST/raw.
    """

    batch: int = 64
    target: str | None = None
    size: int | None = None
    mean: float = 0.0
    std: float = 1.0
    data_dir: Path | None = None


def read_batches(source: str, how: Reading) -> Iterable[Any]:
    """Return batches of data: of inputs, or pairs of inputs and labels.

    Args:
        source: Where the data are; `KNOWN` lists the forms.
        how: How they are read.

    Raises:
        PlasticError: There are no such data, they cannot be read, or a package for it is missing.
    """
    for option, value in (("--batch", how.batch), ("--image-size", how.size), ("--std", how.std)):
        if value is not None and not value > 0:
            raise PlasticError(f"{option} {value}: a number above 0")
    path = Path(source)
    if source in DATASETS:
        train = load_data(source, how.data_dir).train
        return _batches(train.x, train.y, how.batch)
    if path.is_dir():
        x, y = _image_folder(path, how)
        return _batches(x, y, how.batch)
    readers = {".npz": _arrays, ".csv": _csv, ".parquet": _parquet}
    if path.suffix in readers:
        if not path.is_file():
            raise PlasticError(f"--data {source}: there is no such file")
        x, y = readers[path.suffix](path, how)
        return _batches(x, y, how.batch)
    package, _, function = source.partition(":")
    if function and not path.exists():
        return _called(source, package, function)
    raise PlasticError(f"--data {source}: give {KNOWN}")


def _batches(x: Tensor, y: Tensor | None, batch: int) -> list[Any]:
    """Return the rows in batches."""
    if not len(x):
        raise PlasticError("--data: there is not a single input in it")
    return list(x.split(batch)) if y is None else list(zip(x.split(batch), y.split(batch), strict=True))


def _called(source: str, package: str, function: str) -> Iterable[Any]:
    """Return what a function returns, which must be batches that can be read again and again."""
    try:
        found = getattr(importlib.import_module(package), function)()
    except Exception as error:  # the function can raise anything
        raise PlasticError(f"--data {source}: {type(error).__name__}: {error}") from error
    check_batches(found)
    return found


def _arrays(path: Path, _: Reading) -> tuple[Tensor, Tensor | None]:
    """Read the arrays x and y of a file of numpy; a single array is x whatever its name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError) as error:
        raise PlasticError(f"--data {path}: {error}") from error
    if "x" not in arrays and len(arrays) == 1:
        arrays = {"x": next(iter(arrays.values()))}
    if "x" not in arrays:
        raise PlasticError(f"--data {path}: it has the arrays {', '.join(arrays)}; the inputs must be named x")
    x, y = _tensor(path, "x", arrays["x"]), arrays.get("y")
    if y is not None and (y.ndim == 0 or len(y) != len(x)):
        raise PlasticError(f"--data {path}: x has {len(x)} rows, and y has {len(y) if y.ndim else 'none'}")
    named = y is not None and y.dtype.kind in "US"  # names of classes
    labels = None if y is None else _classes(y.tolist()) if named else _tensor(path, "y", y)
    return x.float() if x.dtype == torch.float64 else x, labels


def _tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    """Return an array as a tensor. Raises `PlasticError` where it holds no numbers, or is a single one."""
    try:
        found = torch.from_numpy(array)
    except TypeError as error:
        raise PlasticError(f"--data {path}: {name} does not hold numbers: {error}") from error
    if not found.dim():
        raise PlasticError(f"--data {path}: {name} is a single number, and has no rows")
    return found


def _csv(path: Path, how: Reading) -> tuple[Tensor, Tensor | None]:
    """Read a table with a head, whose columns are numbers, and the target names of classes or numbers."""
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise PlasticError(f"--data {path}: a head and a row are needed")
    head = [name.strip() for name in rows[0]]
    if all("." in name and _is_number(name) for name in head):
        raise PlasticError(f"--data {path}: the first line holds numbers; write a head with the names of the columns")
    if uneven := next((i for i, row in enumerate(rows, 1) if len(row) != len(head)), None):
        raise PlasticError(f"--data {path}: line {uneven} has not {len(head)} columns")
    return _table(path, {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(head)}, how)


def _is_number(text: str) -> bool:
    """Return whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet(path: Path, how: Reading) -> tuple[Tensor, Tensor | None]:
    """Read a table, or images that lie in a column as bytes."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise PlasticError(f"--data {path}: reading it needs pyarrow: pip install pyarrow") from None
    try:
        columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except Exception as error:  # pyarrow has many kinds of error
        raise PlasticError(f"--data {path}: {error}") from error
    images = next((name for name, values in columns.items() if values and _encoded(values[0]) is not None), None)
    if images is None:
        return _table(path, columns, how)
    x = _stacked(path, [_pixels(_encoded(value), how) for value in columns[images]])
    target = how.target or next((n for n in columns if n in ("label", "labels", "y")), None)
    if target is None:
        return x, None
    if target not in columns:
        raise PlasticError(f"--data {path}: there is no column {target!r}, only {', '.join(columns)}")
    return x, _classes(columns[target])


def _encoded(value: Any) -> bytes | None:
    """Return the bytes of an encoded image, which may lie in a struct, or None."""
    value = value.get("bytes") if isinstance(value, Mapping) else value
    return value if isinstance(value, bytes) else None


def _table(path: Path, columns: Mapping[str, Sequence[Any]], how: Reading) -> tuple[Tensor, Tensor | None]:
    """Return the columns of a table as inputs, and its target."""
    if how.target is not None and how.target not in columns:
        raise PlasticError(f"--data {path}: there is no column {how.target!r}, only {', '.join(columns)}")
    found: list[np.ndarray] = []
    for name, values in columns.items():
        if name != how.target:
            try:
                found.append(np.asarray(values, dtype=np.float32))
            except (ValueError, TypeError) as error:
                raise PlasticError(
                    f"--data {path}: the column {name!r} does not hold numbers only ({error}); give --target if it is "
                    "what is to be predicted, or encode it before"
                ) from error
    if not found:
        raise PlasticError(f"--data {path}: there is no column beside the target")
    x = torch.from_numpy(np.stack(found, 1))
    return x, None if how.target is None else _classes(columns[how.target])


def _classes(values: Sequence[Any]) -> Tensor:
    """Return the target: whole numbers and names as classes, and other numbers as they are."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        return torch.from_numpy(np.unique(np.asarray(values, dtype=str), return_inverse=True)[1])
    whole = bool((numbers == np.round(numbers)).all())
    return torch.from_numpy(numbers.astype(np.int64) if whole else numbers.astype(np.float32))


def _image_folder(folder: Path, how: Reading) -> tuple[Tensor, Tensor | None]:
    """Read the images in the folders of a folder, one for each class, or those that lie in it without classes."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [(p, i) for i, c in enumerate(classes) for p in sorted(c.rglob("*")) if p.suffix.lower() in _IMAGES]
    plain = [(p, -1) for p in sorted(folder.iterdir()) if p.suffix.lower() in _IMAGES]
    if not (files or plain):
        raise PlasticError(f"--data {folder}: there are no images in it ({', '.join(_IMAGES)})")
    chosen = files or plain
    x = _stacked(folder, [_pixels(p.read_bytes(), how) for p, _ in chosen])
    return x, torch.tensor([i for _, i in chosen]) if files else None


def _pixels(encoded: bytes | None, how: Reading) -> Tensor:
    """Return an image as numbers, shape (channels, height, width)."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(encoded or b""))
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise PlasticError(f"--data: {error}") from error
    if how.size is not None:
        image = image.resize((how.size, how.size))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return (pixels - how.mean) / how.std


def _stacked(path: Path, images: list[Tensor]) -> Tensor:
    """Return images of one size in one tensor."""
    if sizes := sorted({tuple(t.shape) for t in images})[1:]:
        raise PlasticError(f"--data {path}: the images have several sizes, such as {sizes[0]}; give --image-size")
    return torch.stack(images)
