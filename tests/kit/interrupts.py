"""Interrupts a call at every point within the library, one after the other, as Ctrl-C does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import plasticnet

# What takes a lock or gives it back cannot be told from what waits for it, and is left out.
_LIBRARY, _LEFT_OUT = str(Path(plasticnet.__file__).parent), "locks.py"


class _Lines:
    """Counts the lines of the library that run, and raises `KeyboardInterrupt` before one of them."""

    def __init__(self, at: int | None, where: str) -> None:
        self.count, self._at, self._where = 0, at, str(Path(_LIBRARY) / where)

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(self._where) or name.endswith(_LEFT_OUT):
            return None
        if event == "line":
            self.count += 1
            if self.count - 1 == self._at:
                raise KeyboardInterrupt
        return self


@contextmanager
def interrupted(at: int | None, where: str = "") -> Iterator[_Lines]:
    """Count the lines that run in this context, and interrupt it before one of them, unless there are fewer.

    Args:
        at: The line, counted from 0; None only counts.
        where: The file or folder of the library whose lines are meant; by default all of it.
    """
    lines, before, gradients = _Lines(at, where), sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(lines)
    try:
        yield lines
    finally:
        sys.settrace(before)
        # An interrupt on the line of a with statement keeps torch's context from being left, which is not ours to mend.
        torch.set_grad_enabled(gradients)


def lines_of(call: Callable[[], object], where: str = "") -> int:
    """Return how many lines of the library, or of a file of it, a call runs."""
    with interrupted(None, where) as lines:
        call()
    return lines.count
