"""Turnstile: a lock that its long holder lends out between two steps.

A plain lock, released and taken again at once by the same thread, hardly ever lets another thread in: the slider of a
running generation would wait for its end. Here the holder asks who waits, and lets exactly those through first.
"""

from __future__ import annotations

import threading
from collections import deque


class Turnstile:
    """Reentrant; waiting threads get in one after another, in the order in which they came."""

    def __init__(self) -> None:
        self._gate = threading.Condition()
        self._owner: int | None = None
        self._depth = 0
        self._queue: deque[object] = deque()

    def __enter__(self) -> Turnstile:
        me = threading.get_ident()
        with self._gate:
            if self._owner == me:
                self._depth += 1
            else:
                self._take(me, 1)
        return self

    def __exit__(self, *_: object) -> None:
        with self._gate:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                self._gate.notify_all()

    def lend(self) -> None:
        """By the holder: let those through who wait now, and take the lock back before anybody who comes later."""
        me = threading.get_ident()
        with self._gate:
            if self._owner != me:
                raise RuntimeError("only the holder of the lock can lend it")
            if self._queue:
                depth, self._owner = self._depth, None
                self._gate.notify_all()
                self._take(me, depth)

    def _take(self, me: int, depth: int) -> None:
        ticket = object()
        self._queue.append(ticket)
        try:
            self._gate.wait_for(lambda: self._owner is None and self._queue[0] is ticket)
        except BaseException:  # Ctrl-C while waiting: those behind must not wait for this ticket
            self._queue.remove(ticket)
            self._gate.notify_all()
            raise
        self._queue.popleft()
        self._owner, self._depth = me, depth
