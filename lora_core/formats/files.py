"""Adapters from files and to files. The formats stand in one tuple; each recognises itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.errors import ConfigError, did_you_mean
from lora_core.families import FAMILIES, Told, family_of_adapter
from lora_core.formats import foreign, words
from lora_core.formats.assembly import Format, Load, Reading, Spelling, outlines
from lora_core.formats.cloneofsimo import Cloneofsimo
from lora_core.formats.diffusers import Diffusers
from lora_core.formats.kohya import Kohya
from lora_core.formats.metadata import family_of_metadata, kohya_metadata
from lora_core.formats.peft import Peft, weight_files
from lora_core.formats.writing import cast
from lora_core.safe_files import Header, read_header, read_tensors

FORMATS: tuple[Format, ...] = (Cloneofsimo(), Peft(), Kohya(), Diffusers())
SPELLINGS: tuple[Spelling, ...] = (Kohya(), Diffusers(), Peft())


def read_adapter(path: Path | str) -> Adapter:
    """A LoRA file, or PEFT's folder of one -> Adapter. Every key is used or named in `unused`.

    The family is told by the layers' shapes; the metadata decides only where those do not tell. Raises
    FileRefused (damaged, unsafe, no LoRA of Stable Diffusion) and NotFinite.
    """
    adapter = _assembled(Path(path), headers_of(path), read_tensors)
    adapter.check_finite()
    return adapter


def describe_adapter(path: Path | str, headers: Sequence[Header] | None = None) -> Adapter:
    """The same from the headers alone: layers, shapes, ranks, alphas, family and metadata are the file's, the tensors
    have no contents (they are on the meta device). `headers`: those of `path`, where they are known already.

    Refuses what `read_adapter` refuses, but for NaN and Inf. Costs milliseconds however large the file is.
    """
    return _assembled(Path(path), headers or headers_of(path), outlines)


def headers_of(path: Path | str) -> list[Header]:
    """Of a file, or of the files that are one LoRA in PEFT's folder. Raises FileRefused."""
    path = Path(path)
    return [read_header(file) for file in (weight_files(path) if path.is_dir() else [path])]


def spelling_of(headers: Sequence[Header]) -> str:
    """The format's name; "" for a file of none."""
    return next((form.name for form in FORMATS for header in headers if form.recognises(header)), "")


def _assembled(path: Path, headers: Sequence[Header], load: Load) -> Adapter:
    deltas: dict[str, Delta] = {}
    unused: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    embeddings: dict[str, dict[str, Tensor]] = {}
    for whole in headers:
        places, header = words.split(whole)
        embeddings |= words.read(whole, places, load)
        # a file of words alone has no layers to look for
        reading = _read(header, load) if header.tensors or not places else Reading({}, ())
        deltas |= reading.deltas
        unused += reading.unused
        metadata |= whole.metadata
    claimed = family_of_metadata(metadata)
    told = family_of_adapter(Adapter(deltas, metadata, claimed.key, told_by=claimed.by))
    if told.key is None:
        told = _of_rows(embeddings)
    name = path.name if path.is_dir() else path.name.removesuffix(".safetensors")
    return Adapter(deltas, metadata, told.key, name, unused, embeddings, told.by)


def _of_rows(embeddings: dict[str, dict[str, Tensor]]) -> Told:
    """The family that words alone show: 768 numbers are of SD 1.x, and SDXL has two encoders."""
    widths = {rows.shape[1] for parts in embeddings.values() for rows in parts.values()}
    if any(len(parts) > 1 for parts in embeddings.values()):
        return Told("sdxl", "words for two text encoders")
    key = next((key for key in ("sd1", "sd2") if widths == {FAMILIES[key].context_width}), None)
    return Told(key, f"words of {FAMILIES[key].context_width} numbers") if key else Told()


def write_adapter(
    adapter: Adapter,
    path: Path | str,
    *,
    spelling: str = "kohya",
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write `adapter` -> the file (kohya, diffusers) or folder (peft) written.

    `dtype` None keeps what the tensors are in. `metadata` is added to the file's own and wins over it; every
    absolute path in it is cut down to a name. Atomic, read back and compared. Raises SaveFailed, NotFinite,
    ConfigError for what a spelling cannot say.
    """
    spellings = {known.name: known for known in SPELLINGS}
    if spelling not in spellings:
        raise ConfigError(f'spelling = "{spelling}" is unknown.{did_you_mean(spelling, spellings)}')
    if not adapter.deltas:
        raise ConfigError("This LoRA has no layers: there is nothing to write. Train or load one first.")
    if adapter.embeddings and spelling != "kohya":
        raise ConfigError(
            f"This LoRA has new words ({', '.join(adapter.embeddings)}), for which the {spelling} spelling has no "
            "place. Write it in the kohya spelling."
        )
    path = written_at(path, spelling)
    embeddings = {
        word: {component: rows.to(dtype=dtype) for component, rows in parts.items()}
        for word, parts in adapter.embeddings.items()
    }
    adapter = replace(cast(adapter, dtype), embeddings=embeddings)
    adapter.check_finite()
    family = family_of_adapter(adapter).key
    named = replace(adapter, family=family, name=adapter.name or path.stem)
    return spellings[spelling].write(named, path, kohya_metadata(named, family=family, facts=metadata or {}))


def written_at(path: Path | str, spelling: str) -> Path:
    """Where `write_adapter` writes: a folder for peft, else a file that ends in .safetensors."""
    path = Path(path)
    if spelling == "peft" or path.suffix == ".safetensors":
        return path
    return path.with_name(f"{path.name}.safetensors")


def _read(header: Header, load: Load) -> Reading:
    foreign.refuse_other_family(header)
    form = next((form for form in FORMATS if form.recognises(header)), None)
    reading = form.read(header, load) if form is not None else None
    if reading is None or not reading.deltas:
        foreign.refuse(header)
    assert reading is not None
    return reading
