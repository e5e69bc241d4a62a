"""The folder that uploads land in: ours alone, on the disk of the models, never larger than its quota.

On the models' disk, because a checked file is then put into the library by a rename and not by a second copy of
gigabytes. Each process has a folder of its own in it; those of processes that are gone are swept at the start.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from lora_core.errors import ConfigError

QUOTA = 8 * 2**30  # bytes
SPARED_S = 3600  # a file may wait this long for its turn behind another job
EMPTY_S = 60  # a repeated upload leaves an empty tmp file behind; one this old is no upload that just begins


class Uploads:
    """`parent` is made, and in it `folder`, which is this process's until `remove`. Raises ConfigError."""

    def __init__(self, parent: Path, *, quota: int = QUOTA) -> None:
        self.quota = quota
        self._coming, self._lock = 0, threading.Lock()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            sweep(parent)
            self.folder = parent.resolve() / f"{os.getpid()}-{secrets.token_hex(4)}"
            self.folder.mkdir()
        except OSError as problem:
            raise ConfigError(
                f"The folder {parent} for uploads cannot be used ({problem.strerror}). Choose a place for the "
                "models that may be written to."
            ) from problem

    def used(self) -> int:
        return sum(size for _, size, _ in self._files())

    @contextlib.contextmanager
    def room_for(self, size: int) -> Iterator[str]:
        """Hold `size` bytes while an upload runs; yields "" or why there is no room."""
        with self._lock:
            free = self._make_room(size)
            problem = "" if size <= free else _no_room(size, free)
            self._coming += 0 if problem else size
        try:
            yield problem
        finally:
            with self._lock:
                self._coming -= 0 if problem else size

    def tidy(self) -> None:
        """Back under the quota: empty leftovers, then the oldest files that nobody can be waiting for."""
        with self._lock:
            self._make_room(0)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_room(self, size: int) -> int:
        """-> bytes that are free for an upload, after removing what may go."""
        files, now = self._files(), time.time()
        used = sum(length for _, length, _ in files) + self._coming
        for written, length, path in sorted(files):
            leftover = length == 0 and now - written > EMPTY_S
            if leftover or (used + size > self.quota and now - written > SPARED_S):
                with contextlib.suppress(OSError):
                    path.unlink()
                    used -= length
                    if path.parent != self.folder:
                        path.parent.rmdir()  # goes only if it is empty
        disk = shutil.disk_usage(self.folder).free - self._coming
        return min(self.quota - used, disk)

    def _files(self) -> list[tuple[float, int, Path]]:
        """(written, size, path); a file that goes away meanwhile is none."""
        found = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                facts = path.lstat()
                if not path.is_dir():
                    found.append((facts.st_mtime, facts.st_size, path))
        return found


def sweep(parent: Path) -> None:
    """Remove the folders of processes that are gone. Nothing that is not named as ours is touched."""
    for folder in parent.iterdir():
        named = re.fullmatch(r"(\d+)-[0-9a-f]{8}", folder.name)
        if named and folder.is_dir() and not folder.is_symlink() and not _lives(int(named[1]), folder):
            shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int, folder: Path) -> bool:
    """Process ids are used again: a process younger than the folder did not make it."""
    try:
        return bool(psutil.Process(pid).create_time() <= folder.stat().st_mtime + 1)
    except (psutil.Error, OSError):
        return False


def _no_room(size: int, free: int) -> str:
    return (
        f"There is no room for {size / 2**20:,.0f} MB of uploads (free: {max(free, 0) / 2**20:,.0f} MB). Wait until "
        "the files before have been taken in, or send fewer at once."
    )
