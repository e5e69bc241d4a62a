"""Shelf: LoRAs that were read stay in host memory, and the next one is read while a picture is being made.

Changing a LoRA costs milliseconds once its factors are in memory; reading it from a slow disk costs seconds.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from lora_core.adapter import Adapter
from lora_core.errors import FileRefused
from lora_core.formats import read_adapter
from lora_core.formats.peft import CONFIG, weight_files

MAX_BYTES = 4 * 2**30  # of the default limit, however large the machine
IDLE_S = 3.0  # the reading thread waits this long for more, then ends

# Where each file behind a path really lies, its size, mtime in ns and inode (0 where the file system has none).
Stamp = tuple[tuple[str, int, int, int], ...]


class Shelf:
    """LoRAs by path, at most `limit_bytes` of tensors (None: an eighth of the machine's memory, 4 GiB at most); the
    least recently used leaves first.

    `read` makes an Adapter of a path. Its tensors must lie in memory of their own: `read_adapter` reads every tensor
    into memory that torch allocated and maps nothing (see safe_files), so nothing is copied here, and a file that is
    overwritten later changes no adapter. Adapters are shared by everyone who asks: nobody may write to one.

    A file counts as the same while place, size, mtime and inode are. A rewrite in place that keeps the size and falls
    into the same tick of the file system's clock goes unnoticed; one that replaces the file, as ours do, has another
    inode.

    Any thread may call any method. No lock is held while a file is looked at or read.
    """

    def __init__(
        self, limit_bytes: int | None = None, read: Callable[[Path], Adapter] = read_adapter
    ) -> None:
        if limit_bytes is None:
            limit_bytes = min(psutil.virtual_memory().total // 8, MAX_BYTES)
        self.limit_bytes = limit_bytes
        self._read_file = read
        self._gate = threading.Condition()  # guards all that follows
        self._kept: OrderedDict[Path, _Kept] = OrderedDict()  # least recently used first
        self._readings: dict[Path, _Reading] = {}
        self._wanted: deque[Path] = deque()
        self._worker: threading.Thread | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors that are kept."""
        with self._gate:
            return sum(kept.size for kept in self._kept.values())

    @property
    def paths(self) -> tuple[Path, ...]:
        """What is kept, least recently used first. Absolute; a file may have changed since it was read."""
        with self._gate:
            return tuple(self._kept)

    def get(self, path: Path | str) -> Adapter:
        """The LoRA of a file or of PEFT's folder: from memory if that is still what lies there, else read.

        A read of it that is under way is waited for. Raises what `read` raises, whichever thread was reading. A
        failure is not remembered: the next call reads again. An adapter larger than the limit is handed out and not
        kept.
        """
        place = _place(path)
        while True:
            stamp = _stamp(place)
            with self._gate:
                adapter = self._find(place, stamp)
                if adapter is not None:
                    self._kept.move_to_end(place)
                    return adapter
                reading = self._readings.get(place)
                if reading is None:
                    reading = self._begin(place, stamp)
                    break
            reading.over.wait()
            # With another stamp it is the outcome of another file. With neither outcome its reader was interrupted
            # (Ctrl-C), which is no answer to us. In both cases look again.
            if reading.stamp == stamp:
                if reading.problem is not None:
                    raise reading.problem
                if reading.adapter is not None:
                    return reading.adapter
        return self._read(place, reading)

    def prefetch(self, *paths: Path | str) -> None:
        """Read these soon, on a thread, the first one first and all before those of earlier calls. Returns at once.

        A path that is kept counts as used now, and is read again only if its file has changed. What is read takes the
        place of the least recently used: name no more than fit, or the last push out the first. A failure is said by
        `get`, which reads again.
        """
        places = [_place(path) for path in paths]
        with self._gate:
            for place in reversed(places):
                if place in self._kept:
                    self._kept.move_to_end(place)
                if place in self._wanted:
                    self._wanted.remove(place)
                self._wanted.appendleft(place)
            if self._wanted and self._worker is None:
                worker = threading.Thread(target=self._work, name="shelf", daemon=True)
                worker.start()
                self._worker = worker
            self._gate.notify()

    def clear(self) -> None:
        """Forget all that is kept and all that was to be read. A read under way ends, and is not kept."""
        with self._gate:
            self._kept.clear()
            self._wanted.clear()
            for reading in self._readings.values():
                reading.keep = False

    # ---------------------------------------------------------------- by whoever holds the gate

    def _find(self, place: Path, stamp: Stamp | None) -> Adapter | None:
        """What is kept of this file; what is kept of an earlier one leaves, before the new one takes memory."""
        kept = self._kept.get(place)
        if kept is None:
            return None
        if kept.stamp != stamp:
            del self._kept[place]
            return None
        return kept.adapter

    def _begin(self, place: Path, stamp: Stamp | None) -> _Reading:
        if place in self._wanted:
            self._wanted.remove(place)
        reading = self._readings[place] = _Reading(stamp)
        return reading

    def _keep(self, place: Path, stamp: Stamp, adapter: Adapter, size: int) -> None:
        if size > self.limit_bytes:
            return
        self._kept.pop(place, None)
        while self._kept and self.size_bytes + size > self.limit_bytes:
            self._kept.popitem(last=False)
        self._kept[place] = _Kept(stamp, adapter, size)

    # ---------------------------------------------------------------- by whoever reads

    def _read(self, place: Path, reading: _Reading) -> Adapter:
        """Read, keep, and tell those who wait. Nothing leaves the shelf for a file that turns out to be unreadable."""
        try:
            adapter = self._read_file(place)
            size = adapter.size_bytes()
            with self._gate:
                # Without a stamp there was no file a moment ago: nothing to recognise this one by.
                if reading.keep and reading.stamp is not None:
                    self._keep(place, reading.stamp, adapter, size)
            reading.adapter = adapter
            return adapter
        except Exception as problem:
            # The error may live for long, and its frames with it, and in these half a file's tensors. The lines of
            # the traceback stay.
            traceback.clear_frames(problem.__traceback__)
            reading.problem = problem
            raise
        finally:
            with self._gate:
                del self._readings[place]
            reading.over.set()

    def _work(self) -> None:
        while True:
            with self._gate:
                if not self._gate.wait_for(lambda: self._wanted, timeout=IDLE_S):
                    self._worker = None
                    return
                place = self._wanted.popleft()
            self._fetch(place)

    def _fetch(self, place: Path) -> None:
        """A function of its own, so that the thread holds on to no adapter and no error while it waits for work."""
        stamp = _stamp(place)
        with self._gate:
            if self._find(place, stamp) is not None or place in self._readings:
                return  # not touched again: it was by `prefetch`, and others may have been used since
            reading = self._begin(place, stamp)
        try:
            self._read(place, reading)
        except (
            Exception
        ):  # whoever waits in `get` has it from `reading`; whoever comes later meets it on reading
            return


class _Kept(NamedTuple):
    stamp: Stamp
    adapter: Adapter
    size: int  # bytes


@dataclass
class _Reading:
    """A read under way. Outcome and `over` are written by the thread that reads, once."""

    stamp: Stamp | None  # of the file before it was opened: a change during the read makes it another file's
    keep: bool = True
    adapter: Adapter | None = None
    problem: Exception | None = None
    over: threading.Event = field(default_factory=threading.Event)


def _place(path: Path | str) -> Path:
    """Absolute. Links are not followed: a LoRA has its name from the link, and PEFT's has its configuration from what
    lies beside the link; a target in the hub's cache is named by a digest. Where they lead is in the stamp."""
    place = Path(path).absolute()
    return place.resolve() if ".." in place.parts else place


def _stamp(place: Path) -> Stamp | None:
    """None where there is no LoRA to be found; why, is the reader's to say."""
    try:
        files = weight_files(place) if place.is_dir() else [place]
        # PEFT keeps the alphas beside the weights: another configuration is another LoRA.
        configs = [file.with_name(CONFIG) for file in files]
        return tuple(_identity(file) for file in [*files, *filter(Path.is_file, configs)])
    except (OSError, ValueError, FileRefused):
        return None


def _identity(file: Path) -> tuple[str, int, int, int]:
    found = file.stat()
    return os.path.realpath(file), found.st_size, found.st_mtime_ns, found.st_ino
