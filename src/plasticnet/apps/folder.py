"""Keeps the folder of a run: one process at a time writes into it, and no run replaces another one unasked."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plasticnet.apps.checkpoints import NAME, Checkpoints
from plasticnet.apps.console import print_line
from plasticnet.apps.settings import MODES, Run, flat
from plasticnet.errors import PlasticError
from plasticnet.files.container import BEGINNING
from plasticnet.files.disk import open_file, read_bytes, remove_partials, replace_file

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


CONFIG, PREPARED, METRICS = "run.json", "prepared.json", "metrics.jsonl"
SUMMARY, REPORT = "summary.json", "report.html"
COMPACT = "compact.safetensors"

_LOCK = ".plasticnet.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what the two systems answer where a lock is held
_RUNS = MODES["compare"]

# How each file of a run may begin. By this a user's own file of the same name is told from one of a run.
_BEGINNINGS = {
    CONFIG: [b'{\n  "data": "'],
    PREPARED: [b'{\n  "shape": ['],
    METRICS: [f'{{"run": "{run}", "epoch": '.encode() for run in _RUNS],
    SUMMARY: [f'{{\n  "{run}": {{\n    "mode": "{run}",'.encode() for run in _RUNS],
    REPORT: [b'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>plasticnet: '],
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder, which is to go on. Raises `PlasticError` where there is none."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        held = _held(folder)
        way_out = "replace what is left of one by --overwrite" if held else "start one without --resume"
        raise PlasticError(f"--resume: there is no run in {folder}, which has no {CONFIG}: {way_out}")
    return read_settings(folder, f"--resume: {path}")


def read_settings(folder: Path, what: str) -> dict[str, Any]:
    """Return the settings in a folder side by side, with what run.json records beside them.

    Raises `PlasticError` where this is not what a run writes there.

    Args:
        folder: The folder of a run.
        what: What the message begins with.
    """
    path = folder / CONFIG
    if _replaceable(path):
        way_out = "replace the run by train --overwrite, or choose another folder"
    else:
        way_out = "move it, or choose another folder"
    run, record = read_run(path, what, way_out)
    return {**flat(run), **record}


def read_run(path: Path, what: str, way_out: str) -> tuple[Run, dict[str, Any]]:
    """Return the settings that a run.json holds, and what it records beside them, which may be missing.

    Args:
        path: The file.
        what: What the message begins with.
        way_out: What the user can do where the file is damaged.

    Raises:
        PlasticError: The file cannot be read, or has fields that are unknown, missing or of another type.
    """
    (content,) = read_json(path, what, way_out)
    try:
        if not isinstance(content, dict) or not isinstance(content.get("record", {}), dict):
            raise PlasticError("it is no object of JSON")
        run = Run.from_dict({name: value for name, value in content.items() if name != "record"})
    except PlasticError as error:
        raise PlasticError(f"{what} does not hold the settings of a run: {error}: {way_out}") from error
    return run, content.get("record", {})


def read_json(path: Path, what: str, way_out: str) -> list[Any]:
    """Return the JSON values in a file of a run: one for each line of metrics.jsonl, and a single one of the others.

    Args:
        path: The file.
        what: What the message begins with.
        way_out: What the user can do where the file is damaged.

    Raises:
        PlasticError: The file cannot be read, or is no JSON.
    """
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise PlasticError(f"{what} is damaged (it holds bytes that are no text): {way_out}") from error
    values: list[Any] = []
    for number, part in enumerate(text.splitlines() if path.name == METRICS else [text], start=1):
        try:
            values.append(json.loads(part))
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) and path.name != METRICS else number
            raise PlasticError(f"{what} is damaged (it is no JSON, as line {line} shows): {way_out}") from error
    return values


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise `PlasticError` where a new run would replace what is in a folder.

    Args:
        folder: The folder, which need not exist.
        overwrite: Whether a run in the folder may be replaced. What is not of a run never is.
    """
    held = _held(folder)
    for path in [*held, *(folder / run for run in _RUNS)]:
        if not _replaceable(path):
            raise PlasticError(
                f"{path} is in the way of a run, and is not of one: choose another --out, or move it; neither --resume "
                "nor --overwrite would touch it"
            )
    if held and not overwrite:
        names = ", ".join(path.relative_to(folder).as_posix() for path in held)
        raise PlasticError(
            f"{folder} holds a run ({names}): go on with it by train --resume, replace it by --overwrite, or choose "
            "another --out"
        )


def clear(folder: Path) -> None:
    """Remove the files of a run from a folder, except its run.json, which is to be replaced next.

    Folders that are empty then are removed, too. The settings go last, so that what is left if this is interrupted says
    what it was.
    """
    held = [path for path in _held(folder) if path.name != CONFIG]
    try:
        for path in held:
            path.unlink()
        for parent in {path.parent for path in held} - {folder}:
            with suppress(OSError):  # it holds something else
                parent.rmdir()
    except OSError as error:
        raise PlasticError(f"the run in {folder} cannot be removed: {error}") from error


def clean(folder: Path) -> None:
    """Remove what processes that were killed have left of files that they wrote, while this one has the lock."""
    paths = _paths(folder)
    for parent in {path.parent for path in paths}:
        remove_partials(parent, {path.name for path in paths if path.parent == parent})


def checkpoints_in(folder: Path, run: str) -> Checkpoints:
    """Return the checkpoints of one of the runs of a folder."""
    return Checkpoints(folder / run / NAME)


def write_text(path: Path, text: str) -> None:
    """Write a text file, which appears whole or not at all. Raises `PlasticError` where it cannot be written."""
    replace_file(path, text.encode())


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing. Raises `PlasticError` where this fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlasticError(f"the folder {folder} cannot be made: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it does not exist.

    The lock is the operating system's, and ends with the process, however that ends. The file that carries it is
    removed at the end. One that a killed process left behind does no harm.

    Raises:
        PlasticError: Another process has the lock, or the folder cannot be written.
    """
    make_folder(folder)
    path = folder / _LOCK
    descriptor = _take(folder, path)
    try:
        yield
    finally:
        # Windows removes no file that is open. Elsewhere the file goes first, while nobody else can have the lock.
        if sys.platform == "win32":
            os.close(descriptor)
        with suppress(OSError):
            if sys.platform == "win32" or _is(descriptor, path):
                path.unlink()
        if sys.platform != "win32":
            os.close(descriptor)


def _take(folder: Path, path: Path) -> int:
    """Return a descriptor of the file that carries the lock, which is then ours."""
    for _ in range(100):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise PlasticError(f"the folder {folder} cannot be written: {error}") from error
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in _TAKEN:
                os.close(descriptor)
                raise PlasticError(f"another process is training in {folder}: wait, or choose another --out") from error
            print_line(f"{folder} is on a file system without locks: make sure that only one process trains in it")
        if _is(descriptor, path):
            return descriptor
        os.close(descriptor)  # the process before us has removed the file since we opened it
    raise PlasticError(f"the lock {path} cannot be taken: it is removed again and again")


def _is(descriptor: int, path: Path) -> bool:
    """Return whether a path still leads to the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _paths(folder: Path) -> list[Path]:
    """Return all paths that a run in a folder may write."""
    own = [p for r in _RUNS for p in (*checkpoints_in(folder, r).paths, folder / r / COMPACT)]
    return [*(folder / name for name in _BEGINNINGS), *own]


def _held(folder: Path) -> list[Path]:
    """Return those of the paths of a run that exist in a folder, also as links to nowhere."""
    return [path for path in _paths(folder) if os.path.lexists(path)]


def _replaceable(path: Path) -> bool:
    """Return whether a path is of a run: a file that begins as a run's does, even if it ends early; or a mode's folder.

    Where there is nothing, or nothing in the file, nothing is lost.
    """
    if path.name in _RUNS:
        return path.is_dir() or not os.path.lexists(path)
    try:
        with open_file(path) as file:
            found = file.read() if path.name == CONFIG else file.read(100)
    except (PlasticError, OSError):
        return False
    if found.strip() in (b"", b"{}", b"[]"):
        return True
    if path.name not in _BEGINNINGS:
        return found[8:].startswith(BEGINNING)  # after the eight bytes in which safetensors has a length
    if path.name == CONFIG and found.rstrip().endswith(b"}") and b'"plasticnet": "' not in found:
        return False  # many a run.json may begin with its data, but it does not name our version
    return any(found.startswith(b) or b.startswith(found) for b in _BEGINNINGS[path.name])
