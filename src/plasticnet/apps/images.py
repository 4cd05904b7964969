"""Reads images as tensors: from the folders of a folder, or from bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plasticnet.apps.parsing import is_unicode
from plasticnet.errors import PlasticError
from plasticnet.files.disk import read_bytes

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Pixels:
    """How images are read.

    Attributes:
        size: The height and width that they are brought to, or None where they have one size.
        channels: 1 makes all of them grey and 3 coloured; None leaves them as they are, but makes all of them coloured
            where some are.
        mean: What is subtracted from pixels between 0 and 1.
        std: What they are then divided by.
    """

    size: int | None = None
    channels: int | None = None
    mean: float = 0.0
    std: float = 1.0


def image_folder(folder: Path, how: Pixels) -> tuple[Tensor, list[str] | None, list[str]]:
    """Read the images in the folders of a folder, one for each class, or those that lie in it without classes.

    Returns:
        The images, shape (images, channels, height, width); the name of each one's folder, or None; and the path of
        each one in the folder.

    Raises:
        PlasticError: There are none, or they have several sizes, or one cannot be read.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [(p, c.name) for c in classes for p in sorted(c.rglob("*")) if p.suffix.lower() in _IMAGES]
    plain = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in _IMAGES]
    if not (files or plain):
        raise PlasticError(f"--data {folder}: there are no images in it ({', '.join(_IMAGES)})")
    paths = [p for p, _ in files] or plain
    if strange := next((p for p in paths if not is_unicode(str(p.relative_to(folder)))), None):
        raise PlasticError(f"--data {folder}: the name {str(strange.relative_to(folder))!a} is not UTF-8: rename it")
    x = _stacked(folder, [_read(read_bytes(p), how, p) for p in paths])
    return x, [name for _, name in files] if files else None, [p.relative_to(folder).as_posix() for p in paths]


def images_in(path: Path, values: Sequence[Any], how: Pixels) -> Tensor:
    """Read a column of images that lie in a table as bytes, shape (images, channels, height, width)."""
    return _stacked(path, [_read(encoded(value), how, path) for value in values])


def encoded(value: Any) -> bytes | None:
    """Return the bytes of an encoded image, which may lie in a struct, or None."""
    value = value.get("bytes") if isinstance(value, Mapping) else value
    return value if isinstance(value, bytes) else None


def _read(content: bytes | None, how: Pixels, path: Path) -> Tensor:
    """Return an image as numbers, shape (channels, height, width)."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content or b""))
        image.load()
    except UnidentifiedImageError as error:
        raise PlasticError(f"--data {path}: it is no image, or damaged: mend it, or remove it") from error
    except Exception as error:  # damaged bytes can make a decoder raise anything
        raise PlasticError(f"--data {path}: it is damaged ({error}): mend it, or remove it") from error
    largest = 255
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert would clip at 255
        image, largest = Image.fromarray(np.array(image, dtype=np.float32)), 65535
    elif image.mode not in ("L", "RGB") or how.channels is not None:
        grey = image.mode in ("1", "L", "LA") if how.channels is None else how.channels == 1
        image = image.convert("L" if grey else "RGB")
    if how.size is not None:
        image = image.resize((how.size, how.size))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / largest
    pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    pixels = pixels.expand(3, -1, -1) if how.channels == 3 and len(pixels) == 1 else pixels
    return (pixels - how.mean) / how.std


def _stacked(path: Path, images: list[Tensor]) -> Tensor:
    """Return images of one size in one tensor; grey ones among coloured ones get three equal channels."""
    sizes = sorted({tuple(t.shape[1:]) for t in images})
    if len(sizes) > 1:
        (height, width), (other, wide) = sizes[:2]
        raise PlasticError(
            f"--data {path}: the images have {len(sizes)} sizes, such as {height} by {width} and {other} by {wide}: "
            "train with --image-size, which brings all of them, and new ones, to one"
        )
    channels = max(len(t) for t in images)
    return torch.stack([t.expand(channels, -1, -1) for t in images])
