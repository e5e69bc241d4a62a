"""Reading .safetensors files so that a hostile one gets nothing; writing files so that a crash loses nothing.

Reading: the header is checked first (safe_header), then every tensor is read into memory of our own. Never
mapped: a mapped file that another program shortens kills the process with SIGBUS, which nothing can catch.
Writing: through safe_writes, after the bytes were read back and compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from lora_core.errors import FileRefused, SaveFailed
from lora_core.progress import steps
from lora_core.safe_header import DTYPES, Header, TensorInfo, opened, read_bytes, read_header, read_into
from lora_core.safe_writes import sweep_partials, write_atomic

__all__ = [
    "Hashes",
    "Header",
    "TensorInfo",
    "hashes_of",
    "read_header",
    "read_raw",
    "read_rows",
    "read_tensors",
    "save_metadata",
    "save_tensors",
    "serialized",
    "stream_tensors",
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


def read_raw(header: Header, infos: Iterable[TensorInfo]) -> bytes:
    """The bytes of these tensors, one after the other; meant for small ones."""
    with opened(header.path) as file:
        spans = ((header.data_start + info.start, info.end - info.start) for info in infos)
        return b"".join([read_bytes(file, start, count, header.path) for start, count in spans])


def read_rows(header: Header, name: str, first: int, last: int) -> Tensor:
    """Rows `first` to `last` (not included) of one tensor, and no others, as `read_tensors` would give them."""
    info = header.tensors[name]
    step = (info.end - info.start) // info.shape[0]
    data = torch.empty((last - first) * step, dtype=torch.uint8)
    with opened(header.path) as file:
        start = header.data_start + info.start + first * step
        read_into(file, start, memoryview(data.numpy().data), header.path)
    return data.view(DTYPES[info.dtype]).reshape(last - first, *info.shape[1:])


def tensors_sha256(source: Header | Path | str) -> str:
    """SHA-256 of the tensors' bytes alone, full hex: `sshs_model_hash`; its first 12 are civitai's AutoV3."""
    return hashes_of([source if isinstance(source, Header) else read_header(source)]).tensors


class Hashes(NamedTuple):
    """SHA-256 in full hex: of the file, None where there are several; of all tensors' bytes, whatever the metadata."""

    file: str | None
    tensors: str

    @property
    def autov2(self) -> str | None:
        """civitai's, of the file."""
        return self.file and self.file[:10]

    @property
    def autov3(self) -> str:
        """civitai's, of the tensors."""
        return self.tensors[:12]


def hashes_of(headers: Sequence[Header]) -> Hashes:
    """Of one file, or of the files that are one LoRA, in their order. Reads all of them, a few MB at a time."""
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    for header in headers:
        left = max((info.end for info in header.tensors.values()), default=0)
        with opened(header.path) as file:
            whole.update(read_bytes(file, 0, header.data_start, header.path))
            position = header.data_start
            while left:
                block = read_bytes(file, position, min(left, 2**22), header.path)
                whole.update(block)
                tensors.update(block)
                position, left = position + len(block), left - len(block)
    return Hashes(whole.hexdigest() if len(headers) == 1 else None, tensors.hexdigest())


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
    return b"".join((_header(header), memoryview(data)[8 + length :]))


def _header(listing: Mapping[str, object]) -> bytes:
    text = json.dumps(listing, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors stay aligned
    return len(text).to_bytes(8, "little") + text


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


def stream_tensors(
    path: Path | str,
    outlines: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """`save_tensors` for what is larger than memory: one tensor at a time is made, written, read back and compared.

    outlines    name -> dtype and shape; produce(name) gives that tensor, on any device. It is called once for each,
                the widest dtypes first, so that all lie aligned
    Raises SaveFailed; what `produce` raises goes through, and nothing is left behind.
    """
    path, names = Path(path), {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(outlines, key=lambda name: (-outlines[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        dtype, shape = outlines[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = _header(header)

    def write(partial: Path) -> None:
        digests = {}
        with partial.open("wb") as file:
            file.write(text)
            for name in steps(order, "tensors"):
                tensor = produce(name).detach().to("cpu")
                assert (tensor.dtype, tuple(tensor.shape)) == outlines[name], name
                data = _bytes(tensor).numpy().data
                file.write(data)
                digests[name] = hashlib.blake2b(data).digest()
        _compare_digests(partial, digests, path)

    write_atomic(path, write, needed=len(text) + end)


def save_metadata(path: Path | str, metadata: Mapping[str, str]) -> None:
    """Other metadata for a .safetensors file, whose tensors stay as they are, byte for byte and in their order.

    Atomic, read back and compared. Raises FileRefused for what is no such file, SaveFailed.
    """
    path = Path(path)
    before = read_header(path)
    listing: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    listing |= {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
        for name, info in before.tensors.items()
    }
    text, end = _header(listing), max((info.end for info in before.tensors.values()), default=0)

    def write(partial: Path) -> None:
        with opened(path) as source, partial.open("wb") as target:
            target.write(text)
            for start in range(0, end, 2**22):
                target.write(read_bytes(source, before.data_start + start, min(2**22, end - start), path))
        with _read_back(path):
            after = read_header(partial)
            same = after.metadata == metadata and after.tensors == before.tensors
            same = same and tensors_sha256(after) == tensors_sha256(before)
        if not same:
            raise SaveFailed(_other_bytes(path))

    write_atomic(path, write, needed=len(text) + end)


def _compare_digests(written: Path, digests: Mapping[str, bytes], path: Path) -> None:
    with _read_back(path):
        header = read_header(written)
        same = set(header.tensors) == set(digests) and all(
            hashlib.blake2b(_bytes(read_tensors(header, [name])[name]).numpy().data).digest() == digest
            for name, digest in steps(digests.items(), "tensors compared")
        )
    if not same:
        raise SaveFailed(_other_bytes(path))


def _compare(written: Path, tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Done on the temporary file: a bad copy never takes the place of a good one."""
    with _read_back(path):
        header = read_header(written)
        same = header.metadata == metadata and set(header.tensors) == set(tensors)
        for name in header.tensors if same else ():
            back, sent = read_tensors(header, [name])[name], tensors[name].detach().to("cpu")
            same = same and back.dtype == sent.dtype and back.shape == sent.shape
            same = same and torch.equal(_bytes(back), _bytes(sent))
    if not same:
        raise SaveFailed(_other_bytes(path))


@contextmanager
def _read_back(path: Path) -> Iterator[None]:
    """What our own reader would refuse is not saved."""
    try:
        yield
    except FileRefused as problem:
        raise SaveFailed(
            f"{path.name} could not be saved: what was written is not a file we would read ({problem})"
        ) from problem


def _other_bytes(path: Path) -> str:
    return (
        f"{path.name} could not be saved in {path.parent}: reading it back gave other bytes than were written. The "
        "disk or the memory may be failing; save to another disk."
    )


def _bytes(tensor: Tensor) -> Tensor:
    """NaN equals nothing, its bytes do."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
