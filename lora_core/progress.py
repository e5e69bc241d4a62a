"""How far long work is, for whoever asked to know.

    with watched(lambda done, total, what: print(f"{what}: {done} of {total}")):
        resize(ink, rank=16)

The listener is found through a context variable, so that what takes minutes (resize, combine, extract, bake) needs no
parameter for it, and two threads have one each. What it raises ends the work, which then leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Listener = Callable[[int, int, str], None]  # done, of how many, what they are
Item = TypeVar("Item")

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def watched(listener: Listener) -> Iterator[None]:
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def steps(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, one after the other; the listener hears 0 of all, and then of each that is done."""
    tell = _listener.get()
    if tell is None or not items:
        yield from items
        return
    tell(0, len(items), what)
    for done, item in enumerate(items, start=1):
        yield item
        tell(done, len(items), what)
