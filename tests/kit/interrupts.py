"""Interrupts a call at every point within the library, one after the other, as Ctrl-C does."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import plasticnet

# What takes a lock or gives it back cannot be told from what waits for it, and is left out.
_LIBRARY, _LEFT_OUT = str(Path(plasticnet.__file__).parent), "locks.py"


@cache
def _ends_of_with(code: CodeType) -> set[int]:
    """Return where a function leaves with statements, by the three None that it hands to ``__exit__``.

    Tracing counts these as lines, but no signal comes there: Python looks for signals after the call, not before it.
    An interrupt there would leave a lock held, on which other threads wait in vain.
    """
    steps = list(dis.get_instructions(code))
    nones = [step.opname == "LOAD_CONST" and step.argval is None for step in steps]
    return {steps[i].offset for i in range(len(steps) - 2) if all(nones[i : i + 3])}


class _Lines:
    """Counts the lines of the library that run, and raises `KeyboardInterrupt` before one of them."""

    def __init__(self, at: int | None, where: str) -> None:
        self.count, self._at, self._where = 0, at, str(Path(_LIBRARY) / where)

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(self._where) or name.endswith(_LEFT_OUT):
            return None
        if event == "line" and frame.f_lasti not in _ends_of_with(frame.f_code):
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
    lines, before = _Lines(at, where), sys.gettrace()
    sys.settrace(lines)
    try:
        yield lines
    finally:
        sys.settrace(before)


def lines_of(call: Callable[[], object], where: str = "") -> int:
    """Return how many lines of the library, or of a file of it, a call runs."""
    with interrupted(None, where) as lines:
        call()
    return lines.count
