"""The header of a .safetensors file, checked in full before anything is made of it.

    8 bytes   length N of the header, little-endian
    N bytes   JSON {"__metadata__": {text: text}, name: {"dtype": "F16", "shape": [4, 320], "data_offsets": [0, 2560]}}
    the rest  the tensors' bytes, without gaps

A hostile file must cost neither memory nor time and reach nothing behind this door: so every number of the
header is bounded (tensor_listing) and every promise compared with the file's real size.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from lora_core.errors import FileRefused
from lora_core.tensor_listing import AGAIN, tensors_and_metadata
from lora_core.tensor_listing import DTYPES as DTYPES
from lora_core.tensor_listing import TensorInfo as TensorInfo

MAX_HEADER = 16 * 2**20  # bytes
PICKLE_NAMES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
SAFER = "Ask for the .safetensors version of it."


@dataclass(frozen=True)
class Header:
    """A checked header: every promise it makes about the file held when it was read.

    Headers that list the same tensors share one table of them."""

    tensors: Mapping[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    path: Path


def read_header(path: Path | str) -> Header:
    """Raises FileRefused, whatever the file holds."""
    path = Path(path)
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = read_bytes(file, 0, min(size, 16), path)
        _refuse_other_kinds(start, size, path)
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER:
            raise FileRefused(
                f"{path.name} announces a header of {length:,} bytes where at most {MAX_HEADER:,} are "
                "allowed: it is no .safetensors file, or a hostile one. Do not use it."
            )
        if 8 + length > size:
            raise FileRefused(
                f"{path.name} is cut short: its header needs {8 + length:,} bytes, the file has {size:,}. "
                f"{AGAIN}"
            )
        raw = read_bytes(file, 8, length, path)
    listing, metadata = tensors_and_metadata(raw, path)
    _check_end(listing.end, size - 8 - length, path)
    return Header(listing.tensors, metadata, 8 + length, path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[FileIO]:
    """A regular file, open for reading without a buffer. Anything else (folder, pipe, device) is refused."""
    # O_NONBLOCK: opening a pipe without a writer would wait for ever. Windows knows neither flag nor pipe.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_dir():
            raise FileRefused(
                f"{path.name} is a folder; a .safetensors file was expected. Choose a file inside it."
            )
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise FileRefused(
            f"{path.name} cannot be opened ({reason}). Check its name and its permissions."
        ) from problem
    with FileIO(descriptor) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileRefused(
                f"{path.name} is a device or a pipe; a .safetensors file was expected. Choose a file."
            )
        yield file


def read_bytes(file: FileIO, position: int, count: int, path: Path) -> bytes:
    """Exactly `count` bytes from `position`, or FileRefused."""
    try:
        file.seek(position)
        if len(block := file.read(count) or b"") == count:
            return block
    except OSError as problem:
        raise _unreadable(path, problem) from problem
    whole = bytearray(count)
    read_into(file, position, memoryview(whole), path)
    return bytes(whole)


def read_into(file: FileIO, position: int, target: memoryview, path: Path) -> None:
    """Fill `target` from `position`. One call may give less than asked for (Linux stops at 2 GiB)."""
    done = 0
    try:
        file.seek(position)
        while done < len(target):
            got = file.readinto(target[done : done + 2**30])
            if not got:
                raise FileRefused(
                    f"{path.name} became shorter while it was read. Wait until it is complete; try again."
                )
            done += got
    except OSError as problem:
        raise _unreadable(path, problem) from problem


def _unreadable(path: Path, problem: OSError) -> FileRefused:
    return FileRefused(f"{path.name} cannot be read ({problem.strerror}). {AGAIN}")


def _refuse_other_kinds(start: bytes, size: int, path: Path) -> None:
    """By content first, so that a pickle under a harmless name is called what it is."""
    if size == 0:
        raise FileRefused(f"{path.name} is empty (0 bytes); a .safetensors file was expected. {AGAIN}")
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        raise FileRefused(
            f"{path.name} is a zip archive or a PyTorch checkpoint, which can run code when opened; only "
            f".safetensors is read. {SAFER}"
        )
    if re.match(rb"\x80[\x02-\x05]", start) and start[8:9] != b"{":
        raise FileRefused(
            f"{path.name} is a Python pickle, which can run code when opened; only .safetensors is read. "
            f"{SAFER}"
        )
    if path.suffix.lower() in PICKLE_NAMES:
        raise FileRefused(
            f"{path.name} has the name of a PyTorch checkpoint ({path.suffix}), which can run code when "
            f"opened; only .safetensors is read. {SAFER}"
        )
    if size < 10:
        raise FileRefused(f"{path.name} has {size} bytes, too few for a .safetensors file. {AGAIN}")
    if start[8:9] != b"{":
        raise FileRefused(
            f"{path.name} is not a .safetensors file: no header stands at its start. Check that the download "
            "is the file itself and not a web page."
        )


def _check_end(end: int, size: int, path: Path) -> None:
    """Nothing is missing, and nothing stands behind the last tensor."""
    if end > size:
        raise FileRefused(
            f"{path.name} is cut short: its tensors need {end:,} bytes, {size:,} are there. {AGAIN}"
        )
    if end < size:
        raise FileRefused(f"{path.name} has {size - end:,} bytes too many behind its last tensor. {AGAIN}")
