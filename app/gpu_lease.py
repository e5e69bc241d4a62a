"""One device, two users: the page's own pipeline, and a training in a child process.

Whoever makes a picture while a training runs asks the training to pause, waits until it says so, and lets it go on
afterwards. Two jobs on one card at once are slower together than one after the other, and may not fit at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.training import Training
from lora_core.errors import LoraError

PATIENCE_S = 120.0  # a step of a large model on a slow machine, and its preview


@contextmanager
def leased(training: Training, check: Callable[[], None]) -> Iterator[None]:
    """Inside, no training step runs. `check` may raise to give up waiting. A training that the user paused stays so."""
    view = training.view()
    if training.current() is None or view is None or view.state in ("paused", "starting"):
        yield
        return
    try:
        commands = training.commands()
        commands.pause()
    except LoraError:  # it ended just now: nothing to wait for
        yield
        return
    try:
        _wait(training, check)
        yield
    finally:
        commands.unpause()


def _wait(training: Training, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while training.current() is not None:
        view = training.view()
        if view is None or view.state in ("paused", "finished", "failed", "stopped"):
            return
        check()
        if time.monotonic() > deadline:
            raise LoraError(
                f"The training did not pause within {PATIENCE_S:.0f} s, so no picture was made. Pause it yourself, "
                "or wait until it is done."
            )
        time.sleep(0.1)
