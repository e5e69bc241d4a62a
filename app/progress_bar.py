"""Progress of a command, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from lora_core.progress import watched


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[None]:
    """A bar for each stretch of work: how many of how many, and the seconds."""
    with ExitStack() as stack:
        if not shown:
            yield
            return
        bars: list[tqdm] = []
        stack.callback(lambda: [bar.close() for bar in bars])

        def told(done: int, total: int, what: str) -> None:
            if done == 0:
                bars[:] = [tqdm(total=total, desc=what, file=sys.stderr, leave=True)]
            bars[0].update(done - bars[0].n)
            if done == total:
                bars[0].close()

        stack.enter_context(watched(told))
        yield
