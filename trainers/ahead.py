"""Pictures that are not kept as latents are opened while the step before them is computed.

Decoding, cutting and scaling a picture of 12 million pixels takes a quarter of a second of a processor core: on a GPU
as long as a step, which would have to wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from trainers.buckets import View
from trainers.caches import Opened, open_view
from trainers.dataset import Example

THREADS = 4


class Ahead:
    """Opens in other threads what is said to come. It only ever hurries: what is opened is the same."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
        self._coming: dict[tuple[Example, View], Future[Opened]] = {}

    def foresee(self, views: Iterable[tuple[Example, View]]) -> None:
        """Begin to open these, and forget those before."""
        coming: dict[tuple[Example, View], Future[Opened]] = {}
        for one in views:
            if one not in coming:
                coming[one] = self._coming.get(one) or self._threads.submit(open_view, *one)
        for one in self._coming.keys() - coming.keys():
            self._coming[one].cancel()
        self._coming = coming

    def open(self, example: Example, view: View) -> Opened:
        """Raises as `open_view`, also what was raised in another thread."""
        begun = self._coming.get((example, view))
        return open_view(example, view) if begun is None else begun.result()
