"""Where a command writes a LoRA, in what form, and what it says about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

import lora_core
from lora_core.adapter import Adapter
from lora_core.changes import apart
from lora_core.dtypes import DTYPES
from lora_core.errors import ConfigError
from lora_core.facts import Facts, kind_name
from lora_core.formats import read_adapter, write_adapter
from lora_core.formats.cautions import cautions
from lora_core.formats.files import headers_of, written_at
from lora_core.formats.metadata import HASHES
from lora_core.looking import few
from lora_core.plain_text import plain
from lora_core.replication import read_map
from lora_core.safe_files import hashes_of

NAMED = 8  # of what was not carried

Weighted = Sequence[tuple[Adapter, float]]
Layers = Mapping[str, nn.Module]


@dataclass(frozen=True, kw_only=True)
class Out:
    """Checked at birth: ConfigError for what exists already, or for a folder that does not."""

    path: Path
    spelling: str = "kohya"
    dtype: str | None = None  # None: as the tensors are
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.spelling != "peft" and self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder. Give the name of the file to write.")
        check_free(written_at(self.path, self.spelling), self.overwrite, folder=self.spelling == "peft")

    def write(self, adapter: Adapter) -> tuple[Path, Adapter]:
        """-> where, and what reading it gives. Raises what `write_adapter` does."""
        dtype = DTYPES[self.dtype] if self.dtype else None
        named = replace(adapter, name=self.path.name.removesuffix(".safetensors"))
        path = write_adapter(named, self.path, spelling=self.spelling, dtype=dtype)
        return path, read_adapter(path)


def check_free(path: Path, overwrite: bool, *, folder: bool) -> None:
    """Before hours of work: a name that can be written to. A folder is never replaced."""
    if path.exists() and (folder or path.is_dir() or not overwrite):
        or_else = "" if folder or path.is_dir() else ", or add --overwrite to replace it"
        raise ConfigError(f"{path} exists already. Choose another name{or_else}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"There is no folder {path.absolute().parent}. Make it first, or choose another.")


def read_parent(file: str | Path) -> Adapter:
    """A LoRA and the hash of the tensors that are in the file now, whatever it says."""
    adapter = read_adapter(file)
    digest = hashes_of(headers_of(Path(file))).tensors
    return replace(adapter, metadata={**adapter.metadata, HASHES[0]: digest})


def layers_for(base: str | None, *adapters: Adapter) -> Layers | None:
    """The base's layers, where one is named: then the LoRAs must be made for it. ConfigError where it is needed and
    not named, and for replicated layers, whose numbers mean others."""
    needing = [(a, path, d) for a in adapters for path, d in a.deltas.items() if d.needs_original]
    for adapter, path, delta in needing:
        what = f"{path} of {adapter.name} is of the kind {kind_name(delta)}, whose change depends on the base's weight"
        if base is None:
            raise ConfigError(f"{what}. Name the model it is for: --base sd15.safetensors")
        if read_map(adapter.metadata):
            raise ConfigError(
                f"{what}, and stands in replicated layers, which no model has. Keep it as it is."
            )
    return lora_core.layers_of(base, *adapters) if base is not None else None


# --- what is said --------------------------------------------------------------------------------------------


def described(adapter: Adapter, path: Path) -> str:
    """ "ink.safetensors: 264 layers of DoRA, rank 16, float16, 37.9 MB"."""
    facts = Facts.of(adapter)
    low, high = (min(facts.ranks), max(facts.ranks)) if facts.ranks else (0, 0)
    ranks = "" if not high else f"rank {high}" if low == high else f"ranks {low} to {high}"
    words = f"new words: {', '.join(facts.words)}" if facts.words else ""
    layers = f"{facts.layers} layers of {few(facts.kinds)}" if facts.layers else ""
    size = f"{size_of(path) / 1e6:,.1f} MB"
    return f"{path.name}: {', '.join(filter(None, (layers, ranks, words, few(facts.dtypes), size)))}"


def size_of(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def written(out: Out, made: Adapter, before: Weighted, layers: Layers | None = None) -> Iterator[str]:
    """Write it, read it back, and say what it is, how far from `before` it is, and who reads it otherwise."""
    path, back = out.write(made)
    yield f"wrote {described(back, path)}"
    yield error_of(before, back, layers)
    yield from (f"in other programs: {caution}" for caution in cautions(back, out.spelling))


def error_of(before: Weighted, back: Adapter, layers: Layers | None) -> str:
    found = apart(before, back, layers)
    unknown = f", without the {len(found.left_out)} layers that need --base" if found.left_out else ""
    return f"error |dW - dW'| / |dW| = {found.share:.4g}{unknown}, measured on what was read back"


def not_carried(names: Sequence[str], where: str) -> list[str]:
    """One line, or none."""
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [
        f"not carried, {len(names)} {where}: {', '.join(plain(name, 200) for name in names[:NAMED])}{more}"
    ]
