"""The JSON of a .safetensors header -> its tensors and its metadata, every number and every text of it checked.

A parser is generous where a header must not be: a name may occur once, a length is a whole number, and 16 MB of
brackets would become half a gigabyte of objects.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_core.errors import FileRefused
from lora_core.memo import Memo

SMALL = 2**19  # characters that can hold no bomb, and are worth remembering
MAX_TENSORS = 20_000
MAX_METADATA = 20_000  # entries
MAX_DIM = 2**24
MAX_DIMS = 8
# Tensors without elements, of v models' checkpoints and of Control-LoRAs: that they are there is all they say.
MARKERS = ("v_pred", "ztsnr", "lora_controlnet")
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
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_WHOLE = {int}  # not bool: JSON's true is an int to isinstance
AGAIN = "Download or copy it again."


class TensorInfo(NamedTuple):
    """One tensor of a header. `start` and `end` are bytes counted from `Header.data_start`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


_UNSAID: object = object()


class Listing(NamedTuple):
    """The tensors of a header, the bytes they take, and metadata that stood among them. Shared: not to be changed."""

    tensors: dict[str, TensorInfo]
    end: int
    metadata: object


def tensors_and_metadata(raw: bytes, path: Path) -> tuple[Listing, dict[str, str]]:
    """Raises FileRefused, whatever the bytes are. `path` is for its sentence."""
    if len(raw) > SMALL:
        _refuse_bomb(raw, path)
    first, text = _split(raw, path)
    make = partial(_listed, text, path)
    listing = LISTINGS.get(text, make) if len(text) <= SMALL else make()
    stated = [metadata for metadata in (first, listing.metadata) if metadata is not _UNSAID]
    if len(stated) > 1:
        raise FileRefused(_damaged(path, "a name occurs twice"))
    return listing, _metadata(stated[0], path) if stated else {}


# A trainer's files of one rank differ in metadata and contents alone: a folder of a thousand has a few listings.
LISTINGS: Memo[Listing] = Memo(16)
_SPACE = r"[ \t\n\r]*"
_FIRST = re.compile(rf'{_SPACE}{{{_SPACE}"__metadata__"{_SPACE}:{_SPACE}')
_MORE = re.compile(rf'{_SPACE}(?:,{_SPACE}(?=")|(?=}}))')


def _refuse_bomb(raw: bytes, path: Path) -> None:
    """Counted before parsing: 16 MB of "[[[[" or of tiny strings would become half a gigabyte of objects."""
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


def _split(raw: bytes, path: Path) -> tuple[object, str]:
    """-> the metadata, where it stands first as most writers have it; JSON of the rest."""
    with _refusing(path):
        text = raw.decode("utf-8")
        if first := _FIRST.match(text):
            metadata, end = _JSON.raw_decode(text, first.end())
            if more := _MORE.match(text, end):
                return metadata, "{" + text[more.end() :]
        return _UNSAID, text


def _listed(text: str, path: Path) -> Listing:
    """The tensors of a header, refusing what a parser would be generous about."""
    with _refusing(path):
        entries = _JSON.decode(text)
        if not isinstance(entries, dict):
            raise ValueError("it is no object")
        if "\\u" in text:
            for name in entries:
                name.encode("utf-8")  # half of a surrogate pair cannot be
    metadata = entries.pop("__metadata__", _UNSAID)
    tensors = {name: _tensor_info(name, entry, path) for name, entry in entries.items()}
    return Listing(tensors, _check_layout(tensors, path), metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        raise ValueError("a name occurs twice")
    return entry


def _never(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_never)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as problem:
        raise FileRefused(_damaged(path, problem)) from problem


def _damaged(path: Path, problem: object) -> str:
    return f"{path.name} has a damaged header ({problem}): it cannot be trusted. {AGAIN}"


def _metadata(entry: object, path: Path) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        raise FileRefused(f"{path.name} has metadata that is not text to text, as the format has it. {AGAIN}")
    if len(entry) > MAX_METADATA:
        raise FileRefused(
            f"{path.name} has {len(entry):,} metadata entries, more than {MAX_METADATA:,}. Do not use it."
        )
    try:
        for key, value in entry.items():
            key.encode("utf-8")
            value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise FileRefused(
            f"{path.name} has metadata that is not valid text ({problem.reason}). {AGAIN}"
        ) from problem
    return entry


def _tensor_info(name: str, entry: Any, path: Path) -> TensorInfo:
    try:  # what is right, in a hundred steps less: headers are read by the thousand
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if (
            len(entry) == 3
            and {*map(type, shape), type(start), type(end)} == _WHOLE
            and len(shape) <= MAX_DIMS
            and (not shape or 0 < min(shape) <= max(shape) <= MAX_DIM)
            and 0 <= start == end - math.prod(shape) * _SIZES[dtype]
            and len(name) <= MAX_NAME
            and type(shape) is type(entry["data_offsets"]) is list
        ):
            return TensorInfo(dtype, tuple(shape), start, end)
    except (KeyError, TypeError, ValueError):
        pass
    return _tensor_info_or_why(name, entry, path)


def _tensor_info_or_why(name: str, entry: object, path: Path) -> TensorInfo:
    """The same, one step after the other, with a sentence for each that fails."""
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
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int for n in shape):
        raise FileRefused(f"{where}: its shape is not a list of at most {MAX_DIMS} whole numbers. {AGAIN}")
    if not all(1 <= n <= MAX_DIM for n in shape) and not (name in MARKERS and shape == [0]):
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


def _check_layout(tensors: dict[str, TensorInfo], path: Path) -> int:
    """-> the bytes that the tensors take. They fill them exactly: no gap, no overlap."""
    if len(tensors) > MAX_TENSORS:
        raise FileRefused(
            f"{path.name} lists {len(tensors):,} tensors, more than {MAX_TENSORS:,}. Do not use it."
        )
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if info.start != position:
            raise FileRefused(
                f'{path.name}, tensor "{name[:80]}" begins at byte {info.start:,} where {position:,} was '
                f"expected: tensors overlap or leave gaps. {AGAIN}"
            )
        position = info.end
    return position
