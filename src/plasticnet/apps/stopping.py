"""Lets a signal stop a training at the end of a step, where its state can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Says that a training was stopped by a signal, and that its state was saved before.

    Attributes:
        signal: The number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """Whether a training is to stop.

    Attributes:
        signal: The number of the signal that asks for it, or None.
    """

    signal: int | None = None

    def check(self) -> None:
        """Raise `Interrupted` where the training is to stop."""
        if self.signal is not None:
            raise Interrupted(self.signal)


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM in this context; a second one ends the process at once.

    A signal that is ignored stays so. Only the main thread can handle signals: elsewhere nothing is noted.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in _SIGNALS if main and signal.getsignal(s) is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, note)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
