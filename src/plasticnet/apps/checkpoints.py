"""Owns the checkpoints of a run: their names, which of them are kept, and from which one the run goes on.

There are the newest one, the one before it, and the best by validation. A new one is first written beside them and only
then takes the place of the newest, so that there is a whole one at every moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plasticnet.errors import PlasticError
from plasticnet.files.checkpoints import load_checkpoint, save_checkpoint
from plasticnet.files.disk import move_file

NAME = "checkpoint.safetensors"  # of the newest


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be read.

    Attributes:
        path: The file.
        content: What was saved.
        passed: Those that are newer, and cannot be read or are missing.
        why: What became of them, as a line for the user; nothing where there are none.
    """

    path: Path
    content: Any
    passed: tuple[Path, ...]
    why: str


class Checkpoints:
    """The checkpoints of a run, which lie in one folder.

    Args:
        newest: The path of the newest one, from whose name those of the others are made.
    """

    def __init__(self, newest: Path) -> None:
        self.newest = newest
        self.before, self.best, self.next = (
            newest.with_name(f"{newest.stem}-{which}{newest.suffix}") for which in ("before", "best", "next")
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that there may be, from the newest on; the best one, which may be older than any, comes last."""
        return (self.next, self.newest, self.before, self.best)

    def exist(self) -> bool:
        """Return whether there is any of them."""
        return any(map(os.path.lexists, self.paths))

    def write(self, state: Any, *, best: bool) -> None:
        """Save a state as the newest one; what was the newest becomes the one before.

        Args:
            state: What `plasticnet.save_checkpoint` takes.
            best: Whether it is the best one, too. This is written first: a run that is killed in between comes to the
                same state again, and writes it once more.

        Raises:
            PlasticError: It cannot be written. What was there before can still be read.
        """
        if best:
            save_checkpoint(state, self.best)
        save_checkpoint(state, self.next)
        if os.path.lexists(self.newest):
            move_file(self.newest, self.before)
        move_file(self.next, self.newest)

    def read(self) -> Found | None:
        """Return the newest one that can be read, or None where there are none at all.

        Raises:
            PlasticError: There are some, and none of them can be read; or a folder is where one of them belongs.
        """
        if folder := next((path for path in self.paths if path.is_dir() and not path.is_symlink()), None):
            raise PlasticError(f"{folder} is a folder, and in the way of a checkpoint: move it, or remove it")
        passed, errors = list[Path](), list[str]()
        for path in self.paths:
            if not os.path.lexists(path):
                if path == self.newest:
                    passed.append(path)
                    errors.append(f"{path} is missing")
                continue
            try:
                content = load_checkpoint(path)
            except PlasticError as error:
                passed.append(path)
                errors.append(str(error))
                continue
            older = path not in (self.next, self.newest)
            return Found(path, content, tuple(passed), f"{errors[-1]}; going on from {path}" if older else "")
        if not self.exist():
            return None
        raise PlasticError(f"{errors[-1]}; remove {_names(self.paths)} to start this run anew")


def _names(paths: Iterable[Path]) -> str:
    """Return the names of the files that there are, with their folder."""
    there = [path for path in paths if os.path.lexists(path)]
    return f"{', '.join(path.name for path in there)} in {there[0].parent}"
