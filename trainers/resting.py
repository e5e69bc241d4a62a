"""Parts of the base that the steps do without leave the device; pictures call them back.

A part that nothing has changed is dropped, and read from its file again when it is wanted: on a machine without a card
the device's memory is all there is. One that a LoRA was trained on, or a base in fewer bits, waits in main memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.bench import Bench


def rest(bench: Bench, component: str) -> None:
    trained = {path.partition(".")[0] for path in bench.form.paths}
    if component in trained or bench.opened.quantised is not None:
        _of(bench, component).to("cpu")
    else:
        bench.opened.offload(component)


@contextmanager
def awake(bench: Bench) -> Iterator[None]:
    """Inside, everything is on the device. Raises FileRefused where the base's files are no longer what they were."""
    resting = [c for c in ("vae", *bench.live.models) if _of(bench, c).device != bench.device]
    try:
        for component in resting:
            if _of(bench, component).device.type == "meta":
                bench.opened.reload(component, bench.device)
            else:
                _of(bench, component).to(bench.device)
        yield
    finally:
        for component in resting:
            rest(bench, component)


def give_back() -> None:
    """What was freed in main memory goes back to the system: glibc would keep hundreds of megabytes that opening a base
    and filling the caches have needed once."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _of(bench: Bench, component: str) -> Any:
    return getattr(bench.live.pipeline, component)
