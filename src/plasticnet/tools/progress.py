"""Shows how far a long piece of work is, with the time that is left: one line on a terminal, and nothing elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_QUIET, _PERIOD = 2.0, 0.2  # seconds before a line appears, and between two of them
_WIDTH = 24


class Progress:
    """A line that says how far a piece of work is. It is a context manager, and leaves nothing behind.

    Args:
        what: What is done, in a few words.
        total: The number of steps.
        stream: Where the line appears; the standard error by default. If it is no terminal, nothing is written.

    Example:
        >>> with Progress("adding", total=3) as progress:
        ...     for i in range(3):
        ...         progress.advance(f"number {i}")
    """

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self.what, self.total, self.done = what, max(total, 1), 0
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._begun = self._shown = time.monotonic()
        self._length = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away."""
        self._write("")

    def advance(self, note: str = "") -> None:
        """Count a step, and show the line where it is time for it.

        Args:
            note: What else the line is to say.
        """
        self.done += 1
        now = time.monotonic()
        if self._live and now - self._begun >= _QUIET and now - self._shown >= _PERIOD:
            self._shown = now
            share = min(self.done / self.total, 1.0)
            left = (now - self._begun) * (1 - share) / share
            bar = "#" * round(share * _WIDTH)
            self._write(f"{self.what} [{bar:<{_WIDTH}}] {share:4.0%}, {_clock(left)} left  {note}")

    def _write(self, text: str) -> None:
        """Write a line over the last one."""
        if self._live and (text or self._length):
            self._stream.write(f"\r{text:<{self._length}}" if text else f"\r{'':<{self._length}}\r")
            self._stream.flush()
            self._length = len(text)


def _clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
