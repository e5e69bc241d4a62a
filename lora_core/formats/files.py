"""Adapters from files and to files. The formats stand in one tuple; each recognises itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.errors import ConfigError, did_you_mean
from lora_core.families import family_of_layers
from lora_core.formats import foreign
from lora_core.formats.assembly import Format, Load, Reading, cast, outlines
from lora_core.formats.diffusers import Diffusers
from lora_core.formats.kohya import Kohya
from lora_core.formats.metadata import family_of_metadata, kohya_metadata
from lora_core.formats.peft import Peft, weight_files
from lora_core.safe_files import Header, read_header, read_tensors

FORMATS: tuple[Format, ...] = (Kohya(), Peft(), Diffusers())


def read_adapter(path: Path | str) -> Adapter:
    """A LoRA file, or PEFT's folder of one -> Adapter. Every key is used or named in `unused`.

    The family is told by the layers' shapes; the metadata decides only where those do not tell. Raises
    FileRefused (damaged, unsafe, no LoRA of Stable Diffusion) and NotFinite.
    """
    adapter = _assembled(Path(path), read_tensors)
    adapter.check_finite()
    return adapter


def describe_adapter(path: Path | str) -> Adapter:
    """The same from the headers alone: layers, shapes, ranks, family and metadata are the file's, the tensors have
    no contents (they are on the meta device) and alphas that are stored as tensors read 1.

    Refuses what `read_adapter` refuses, but for NaN and Inf. Costs milliseconds however large the file is.
    """
    return _assembled(Path(path), outlines)


def _assembled(path: Path, load: Load) -> Adapter:
    headers = [read_header(file) for file in (weight_files(path) if path.is_dir() else [path])]
    deltas: dict[str, Delta] = {}
    unused: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    for header in headers:
        reading = _read(header, load)
        deltas |= reading.deltas
        unused += reading.unused
        metadata |= header.metadata
    shapes = {layer: delta.shape() for layer, delta in deltas.items()}
    family = family_of_layers(shapes) or family_of_metadata(metadata)
    name = path.name if path.is_dir() else path.name.removesuffix(".safetensors")
    return Adapter(deltas, metadata, family, name, unused)


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
    formats = {form.name: form for form in FORMATS}
    if spelling not in formats:
        raise ConfigError(f'spelling = "{spelling}" is unknown.{did_you_mean(spelling, formats)}')
    if not adapter.deltas:
        raise ConfigError("This LoRA has no layers: there is nothing to write. Train or load one first.")
    path = Path(path)
    if spelling != "peft" and path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    adapter = cast(adapter, dtype)
    family = family_of_layers({p: d.shape() for p, d in adapter.deltas.items()}) or adapter.family
    named = replace(adapter, family=family, name=adapter.name or path.stem)
    return formats[spelling].write(named, path, kohya_metadata(named, family=family, facts=metadata or {}))


def _read(header: Header, load: Load) -> Reading:
    foreign.refuse_other_family(header)
    form = next((form for form in FORMATS if form.recognises(header)), None)
    reading = form.read(header, load) if form is not None else None
    if reading is None or not reading.deltas:
        foreign.refuse(header)
    assert reading is not None
    return reading
