"""Writing files so that a crash loses nothing, and removing what crashes leave behind.

Into a temporary file beside the target, flushed to the disk, then renamed over it. No torch here: whoever writes a
note of ten bytes need not wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import psutil

from lora_core.errors import SaveFailed


def write_atomic(path: Path | str, write: Callable[[Path], None], *, needed: int | None = None) -> None:
    """Call `write` with a temporary path in the same folder, then put that file in the place of `path`.

    After a crash or a power cut at any moment `path` holds the old content or the new, whole. The mode of an
    existing file is kept. `needed` (bytes) is for the message only. Raises SaveFailed for every OSError; what
    else `write` raises goes through. Whenever it fails, the old file stays and the temporary one goes.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
        write(partial)
        _flush(partial)
        if mode is not None:
            partial.chmod(mode)
        os.replace(partial, path)
        _flush(path.parent)
    except OSError as problem:
        raise SaveFailed(_why_not_saved(path, problem, needed)) from problem
    finally:
        with contextlib.suppress(OSError):  # normally gone; if it cannot be removed, sweep_partials will
            partial.unlink(missing_ok=True)


def write_folder_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """Call `write` with a new empty folder beside `path`, then give it that name, which must not exist yet.

    Raises SaveFailed for every OSError; what else `write` raises goes through. Whenever it fails, nothing is left.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        write(partial)
        for part in (*partial.rglob("*"), partial):
            _flush(part)
        os.rename(partial, path)
        _flush(path.parent)
    except OSError as problem:
        raise SaveFailed(_why_not_saved(path, problem, None)) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_atomic(source: Path | str, path: Path | str) -> None:
    """A copy of a file's bytes, whole or not there. Raises SaveFailed."""

    def write(partial: Path) -> None:
        shutil.copyfile(source, partial)

    write_atomic(path, write)


def sweep_partials(folder: Path | str) -> list[Path]:
    """Remove the temporary files and folders that killed processes left in `folder`; those of a living writer stay."""
    swept: list[Path] = []
    for partial in Path(folder).glob(".*.partial"):
        named = re.search(r"\.(\d+)-[0-9a-f]{8}\.partial$", partial.name)
        if named is None or _still_writing(int(named[1]), partial):
            continue
        with contextlib.suppress(OSError):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()
            swept.append(partial)
    return swept


def _flush(path: Path) -> None:
    """fsync. A rename is on the disk only once its folder is; Windows has no such call for folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _still_writing(pid: int, partial: Path) -> bool:
    """Process ids are used again: a process younger than the file did not write it."""
    try:
        return bool(psutil.Process(pid).create_time() <= partial.stat().st_mtime + 1)
    except (psutil.Error, OSError):
        return False


def _why_not_saved(path: Path, problem: OSError, needed: int | None) -> str:
    full = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "your quota of disk space is used up",
        errno.EFBIG: "files of this size are not allowed there",
    }
    if problem.errno in full:
        size = f"{needed / 2**20:,.1f} MB are needed" if needed else "more space is needed"
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free / 2**20:,.1f} MB"
        return (
            f"{path.name} could not be saved in {path.parent}: {full[problem.errno]} ({size}; free: {free}). "
            "What was there before is untouched; free some space or choose another folder, then save again."
        )
    return (
        f"{path.name} could not be saved in {path.parent}: {problem.strerror or problem}. What was there "
        "before is untouched; check that the folder exists and may be written to, or choose another."
    )
