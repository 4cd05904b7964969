"""Opens files that are read, and replaces files that are written: what is no plain file is refused, nothing is halved.

A file is written under a name that nobody can predict, brought to the disk, and then renamed. So whoever reads it, and
whoever looks after a crash, finds the old content or the new one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from plasticnet.errors import PlasticError

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]  # what names a file
# Flags that not every system has: nothing of the user's is followed, waited for, inherited or changed on the way.
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NEW = _WRITE | getattr(os, "O_NOFOLLOW", 0)
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial")
_IN_THE_WAY = (errno.EISDIR, errno.ENXIO, errno.ELOOP)  # a folder, a pipe that nobody reads, and a link
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path_of(path: AnyPath) -> str:
    """Return the path of a file as text. Raises `PlasticError` where it cannot be one."""
    try:
        text = os.fsdecode(path)
        possible = b"\0" not in os.fsencode(text)
    except (TypeError, UnicodeError):  # it is something else, or has characters that no name of a file has
        text, possible = "", False
    if not possible:
        raise PlasticError(
            f"{path!r} is no path of a file: a str, bytes or pathlib.Path is one, without NUL and surrogates"
        )
    return text


def open_file(path: AnyPath) -> BinaryIO:
    """Open a plain file to read its bytes. A link to one is followed.

    Raises:
        PlasticError: It is not there or cannot be read, or it is a folder, a pipe, a socket or a device, for whose
            content one could wait for ever.
    """
    path = path_of(path)
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        raise PlasticError(f"{path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PlasticError(f"{path} cannot be read: it is a folder, a pipe or a device, and no plain file")
    return open(descriptor, "rb")


def read_bytes(path: AnyPath) -> bytes:
    """Return the content of a plain file. Raises `PlasticError` as `open_file` does."""
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise PlasticError(f"{path} cannot be read: {error.strerror or error}") from error


def replace_file(path: AnyPath, data: bytes | bytearray) -> None:
    """Write a file, which appears whole or not at all, also where the computer stops in the middle.

    Args:
        path: The file, which is replaced if it exists. A link is replaced, too, and not what it leads to.
        data: Its content.

    Raises:
        PlasticError: The file cannot be written. What it held before is still there.
    """
    path = path_of(path)
    target, partial = Path(path), None
    try:
        if target.exists() and not target.is_file():
            raise PlasticError(
                f"{path} cannot be written: it is a folder, a pipe or a device: remove it, or give another path"
            )
        partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.partial")
        with open(os.open(partial, _NEW, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        bring_to_disk(target.parent)
    except BaseException as error:
        if partial is not None:
            with suppress(OSError):  # the file, or even its folder, may not exist
                partial.unlink()
        if isinstance(error, OSError):
            raise not_written(path, error) from error
        raise  # an interruption by the user


def append_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write bytes at the end of a plain file, and bring them to the disk. Raises `PlasticError` where this fails."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        with open(os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666), "ab") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise not_written(path, error) from error


def move_file(old: Path, new: Path) -> None:
    """Give a file another name, under which there may be one, in the same folder.

    Raises:
        PlasticError: This fails; both are then as they were.
    """
    try:
        os.replace(old, new)
    except OSError as error:
        raise not_written(new, error) from error
    bring_to_disk(new.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if there is one. Raises `PlasticError` where this fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise PlasticError(f"{path} cannot be removed: {error.strerror or error}: remove it yourself") from error


def remove_partials(folder: Path, names: set[str]) -> None:
    """Remove what processes that were killed have left of files with these names in a folder, and nothing else.

    No other process may be writing these files now.
    """
    with suppress(OSError):  # there is no such folder, or what was left must stay
        for path in folder.iterdir():
            found = _PARTIAL.fullmatch(path.name)
            if found and found[1] in names:
                path.unlink()


def not_written(path: str | os.PathLike[str], error: OSError) -> PlasticError:
    """Return the error that says why a file cannot be written, and the way out."""
    if error.errno in _FULL:
        way_out = "make room on this disk, or write elsewhere"
    elif isinstance(error, FileNotFoundError):
        way_out = f"make the folder {Path(path).parent}, or write elsewhere"
    elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
        way_out = "make its folder writable, or write elsewhere"
    elif error.errno in _IN_THE_WAY:
        way_out = "remove what lies there"
    else:
        way_out = "give another path"
    return PlasticError(f"{path} cannot be written: {error.strerror or error}: {way_out}")


def bring_to_disk(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can do that."""
    with suppress(OSError):  # as on Windows, where a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
