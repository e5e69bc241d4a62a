"""What the trainer is told while it runs: SIGINT and SIGTERM save and stop; a second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_core.errors import Stopped


class StopRequest:
    """Asked between steps; set by a signal or by another thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def ask(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raise Stopped if asked: for the long work before the first step, which keeps what it has made."""
        if self.asked:
            raise Stopped(
                "Stopped before the first step. Class pictures and latents made so far are kept; start again."
            )

    @property
    def asked(self) -> bool:
        return self._event.is_set()


@contextmanager
def signals_ask(stop: StopRequest) -> Iterator[None]:
    """While inside, the first SIGINT or SIGTERM asks `stop`; the second leaves with 130 at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            os._exit(130)
        stop.ask()

    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers belong to the main thread; a caller in another one uses stop.ask()
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
