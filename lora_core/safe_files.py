"""Reading .safetensors files so that a hostile one gets nothing; writing files so that a crash loses nothing.

Reading: the header is checked first (safe_header), then every tensor is read into memory of our own. Never
mapped: a mapped file that another program shortens kills the process with SIGBUS, which nothing can catch.
Writing: into a temporary file beside the target, flushed to the disk, then renamed over it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from safetensors.torch import save as serialize
from torch import Tensor

from lora_core.errors import FileRefused, SaveFailed
from lora_core.safe_header import DTYPES, Header, TensorInfo, opened, read_bytes, read_header, read_into

__all__ = [
    "Header",
    "TensorInfo",
    "read_header",
    "read_tensors",
    "save_tensors",
    "serialized",
    "sweep_partials",
    "tensors_sha256",
    "write_atomic",
]


def read_tensors(source: Header | Path | str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, in memory of their own; all of them unless `names` says which.

    Raises FileRefused; KeyError for a name the header does not have.
    """
    header = source if isinstance(source, Header) else read_header(source)
    wanted = header.tensors if names is None else {name: header.tensors[name] for name in names}
    tensors: dict[str, Tensor] = {}
    with opened(header.path) as file:
        for name, info in sorted(wanted.items(), key=lambda item: item[1].start):
            data = torch.empty(info.end - info.start, dtype=torch.uint8)
            read_into(file, header.data_start + info.start, memoryview(data.numpy().data), header.path)
            # A byte other than 0 and 1 seen as a bool is undefined behaviour: compared, not reinterpreted.
            typed = data != 0 if info.dtype == "BOOL" else data.view(DTYPES[info.dtype])
            tensors[name] = typed.reshape(info.shape)
    return {name: tensors[name] for name in wanted}


def tensors_sha256(source: Header | Path | str) -> str:
    """SHA-256 of the tensors' bytes alone, full hex: `sshs_model_hash`; its first 12 are civitai's AutoV3."""
    header = source if isinstance(source, Header) else read_header(source)
    left = max((info.end for info in header.tensors.values()), default=0)
    digest, position = hashlib.sha256(), header.data_start
    with opened(header.path) as file:
        while left:
            block = read_bytes(file, position, min(left, 2**22), header.path)
            digest.update(block)
            position, left = position + len(block), left - len(block)
    return digest.hexdigest()


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


def sweep_partials(folder: Path | str) -> list[Path]:
    """Remove the temporary files that killed processes left in `folder`; those of a living writer stay."""
    swept: list[Path] = []
    for partial in Path(folder).glob(".*.partial"):
        named = re.search(r"\.(\d+)-[0-9a-f]{8}\.partial$", partial.name)
        if named is None or _still_writing(int(named[1]), partial):
            continue
        with contextlib.suppress(OSError):
            partial.unlink()
            swept.append(partial)
    return swept


def serialized(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a .safetensors file, always the same for the same input. Tensors may be on any device,
    strided, or share memory."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        # The library refuses tensors that share memory; here each simply gets its own.
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        own[name] = plain
    data = serialize(own, metadata=metadata or None)  # with {} and no tensors 0.8 writes a broken header
    # The library shuffles the metadata anew in every process; sorted, the same LoRA is the same file.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors stay aligned
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]))


def save_tensors(
    path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file atomically, after reading it back and comparing bit for bit.

    Needs as much free memory as the file will be large. Raises SaveFailed.
    """
    path = Path(path)
    data = serialized(tensors, metadata or {})

    def write(partial: Path) -> None:
        partial.write_bytes(data)
        _compare(partial, tensors, metadata or {}, path)

    write_atomic(path, write, needed=len(data))


def _compare(written: Path, tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Done on the temporary file: a bad copy never takes the place of a good one."""
    try:
        header = read_header(written)
        same = header.metadata == metadata and set(header.tensors) == set(tensors)
        for name in header.tensors if same else ():
            back, sent = read_tensors(header, [name])[name], tensors[name].detach().to("cpu")
            same = same and back.dtype == sent.dtype and back.shape == sent.shape
            same = same and torch.equal(_bytes(back), _bytes(sent))
    except FileRefused as problem:
        raise SaveFailed(
            f"{path.name} could not be saved: what was written is not a file we would read ({problem})"
        ) from problem
    if not same:
        raise SaveFailed(
            f"{path.name} could not be saved in {path.parent}: reading it back gave other bytes than were "
            "written. The disk or the memory may be failing; save to another disk."
        )


def _bytes(tensor: Tensor) -> Tensor:
    """NaN equals nothing, its bytes do."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


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
