"""The header of a .safetensors file, checked in full before anything is made of it.

    8 bytes   length N of the header, little-endian
    N bytes   JSON {"__metadata__": {text: text}, name: {"dtype": "F16", "shape": [4, 320], "data_offsets": [0, 2560]}}
    the rest  the tensors' bytes, without gaps

A hostile file must cost neither memory nor time and reach nothing behind this door: so every number of the
header is bounded and every promise compared with the file's real size.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import FileRefused

MAX_HEADER = 16 * 2**20  # bytes
MAX_TENSORS = 20_000
MAX_METADATA = 20_000  # entries
MAX_DIM = 2**24
MAX_DIMS = 8
MAX_NAME = 1000  # characters; real names have fewer than 200, and patterns are matched against them
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLE_NAMES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
SAFER = "Ask for the .safetensors version of it."
AGAIN = "Download or copy it again."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a header. `start` and `end` are bytes counted from `Header.data_start`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: every promise it makes about the file held when it was read."""

    tensors: dict[str, TensorInfo]
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
    entries = _parse(raw, path)
    del raw
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    tensors = {name: _tensor_info(name, entry, path) for name, entry in entries.items()}
    _check_layout(tensors, size - 8 - length, path)
    return Header(tensors, metadata, 8 + length, path)


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
    block = bytearray(count)
    read_into(file, position, memoryview(block), path)
    return bytes(block)


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
        raise FileRefused(f"{path.name} cannot be read ({problem.strerror}). {AGAIN}") from problem


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


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    """JSON of the header, refusing what a parser would be generous about."""
    # Counted before parsing: 16 MB of "[[[[" or of tiny strings would become half a gigabyte of objects.
    # Backslashes occur inside strings only: without the escaped quotes every second piece lies outside one.
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = plain.count(b'"')
    limit = 2 * (5 * MAX_TENSORS + 2 * MAX_METADATA)
    outside = b"".join(plain.split(b'"')[::2]) if quotes <= limit else b""
    del plain
    braces, brackets, commas = (outside.count(c) for c in (b"{", b"[", b","))
    if (
        quotes > limit
        or braces > MAX_TENSORS + 2
        or brackets > 2 * MAX_TENSORS
        or commas > (MAX_DIMS + 4) * MAX_TENSORS + MAX_METADATA
    ):
        raise FileRefused(
            f"{path.name} lists more than {MAX_TENSORS:,} tensors or {MAX_METADATA:,} metadata entries: no "
            "LoRA or model does. Do not use it."
        )

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) != len(pairs):
            raise ValueError("a name occurs twice")
        return entry

    def never(constant: str) -> None:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=never)
        if not isinstance(entries, dict):
            raise ValueError("it is no object")
        for name in entries:
            name.encode("utf-8")  # half of a surrogate pair cannot be
    except (ValueError, RecursionError) as problem:
        raise FileRefused(
            f"{path.name} has a damaged header ({problem}): it cannot be trusted. {AGAIN}"
        ) from problem
    return entries


def _metadata(entry: object, path: Path) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        raise FileRefused(f"{path.name} has metadata that is not text to text, as the format has it. {AGAIN}")
    try:
        for key, value in entry.items():
            key.encode("utf-8")
            value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise FileRefused(
            f"{path.name} has metadata that is not valid text ({problem.reason}). {AGAIN}"
        ) from problem
    return entry


def _tensor_info(name: str, entry: object, path: Path) -> TensorInfo:
    where = f'{path.name}, tensor "{name[:80]}"'
    if len(name) > MAX_NAME:
        raise FileRefused(f"{where}: its name has {len(name):,} characters. Do not use it.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileRefused(f"{where}: dtype, shape and data_offsets were expected and nothing else. {AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileRefused(
            f"{where}: dtype {str(dtype)[:40]!r} is unknown; expected one of {', '.join(DTYPES)}. {AGAIN}"
        )
    # type(...) is int: JSON's true is an int to isinstance
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int for n in shape):
        raise FileRefused(f"{where}: its shape is not a list of at most {MAX_DIMS} whole numbers. {AGAIN}")
    if not all(1 <= n <= MAX_DIM for n in shape):
        raise FileRefused(
            f"{where}: shape {shape} has a side that is not between 1 and {MAX_DIM:,}. Do not use it."
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise FileRefused(f"{where}: data_offsets is not a pair of whole numbers. {AGAIN}")
    start, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if start < 0 or end - start != expected:
        raise FileRefused(
            f"{where}: {dtype} of shape {shape} takes {expected:,} bytes, its place in the file is "
            f"{start} to {end}. {AGAIN}"
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def _check_layout(tensors: dict[str, TensorInfo], data_size: int, path: Path) -> None:
    """The tensors fill the data exactly: no gap, no overlap, nothing behind the last one."""
    if len(tensors) > MAX_TENSORS:
        raise FileRefused(
            f"{path.name} lists {len(tensors):,} tensors, more than {MAX_TENSORS:,}. Do not use it."
        )
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start != position:
            raise FileRefused(
                f'{path.name}, tensor "{name[:80]}" begins at byte {info.start:,} where {position:,} was '
                f"expected: tensors overlap or leave gaps. {AGAIN}"
            )
        position = info.end
    if position > data_size:
        raise FileRefused(
            f"{path.name} is cut short: its tensors need {position:,} bytes, {data_size:,} are there. {AGAIN}"
        )
    if position < data_size:
        raise FileRefused(
            f"{path.name} has {data_size - position:,} bytes too many behind its last tensor. {AGAIN}"
        )
