"""A lock that a thread may take again while it has it, and that is not copied with what it protects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from plasticnet.errors import PlasticError

# For so many seconds a thread waits for another one. Long training steps, with their compilation, take less.
PATIENCE = 1800.0


class Lock:
    """Lets one thread at a time work on something; the others wait. The same thread may enter again.

    A backward pass may run parts of a model in threads of its own while the thread that has started it waits for them
    inside of the lock. `again` lets these in.

    Attributes:
        hold: How often the lock was taken by a thread that did not have it.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.RLock(), threading.RLock()
        self._owner: int | None = None
        self._guests: set[int] = set()
        self._depth = 0
        self.hold = 0

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()

    def __enter__(self) -> None:
        # What is compiled holds no locks. (`is_compiling` would also be true while another thread compiles something.)
        if torch.compiler.is_dynamo_compiling():
            return
        me = threading.get_ident()
        if me in self._guests:
            self._inside.acquire()
            return
        if not self._lock.acquire(timeout=PATIENCE):
            raise PlasticError(
                f"this thread has waited {PATIENCE:.0f} seconds for another one that is using the network. A closure "
                "of expected_loss must call the network from its own thread: a thread that it waits for cannot enter"
            )
        self._depth += 1
        if self._depth == 1:
            self._owner, self.hold = me, self.hold + 1

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        if threading.get_ident() in self._guests:
            self._inside.release()
            return
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    @contextmanager
    def again(self, hold: int) -> Iterator[None]:
        """Take the lock to go on with what was begun when it was held for the ``hold``-th time.

        Where that hold is not over, its thread waits for this one, which therefore enters beside it.
        """
        me = threading.get_ident()
        beside = self.hold == hold and self._owner not in (None, me) and me not in self._guests
        if beside:
            self._guests.add(me)
        try:
            with self:
                yield
        finally:
            if beside:
                self._guests.discard(me)
