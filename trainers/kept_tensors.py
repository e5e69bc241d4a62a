"""Tensors kept on disk under a key that says all that decides them, so that nothing kept can go stale.

A file that is not, bit for bit, what was saved under its key is as good as none: a checksum over key, types, shapes
and bytes finds a single bit. So is one that holds NaN: whoever made it made a mistake that must not be learnt from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.errors import FileRefused
from lora_core.safe_files import read_header, read_tensors, save_tensors, sweep_partials


@dataclass
class FillReport:
    """Counts of what was to be had, and by name what a user should hear of."""

    found: int = 0
    built: int = 0
    rebuilt: list[str] = field(default_factory=list)
    """What had a damaged file."""
    unsaved: dict[str, str] = field(default_factory=dict)
    """What is only in memory -> why (a full disk, say)."""

    def __str__(self) -> str:
        counts = {"encoded": self.built, "found": self.found, "rebuilt": len(self.rebuilt)}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none"


class KeptTensors:
    """A folder of them. Keys are file names: hexadecimal digests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with suppress(OSError):  # each file that cannot be written is then said with its reason
            folder.mkdir(parents=True, exist_ok=True)
        sweep_partials(folder)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises SaveFailed."""
        save_tensors(self.path(key), dict(tensors), {"sha256": checksum(key, tensors)})

    def load(self, key: str) -> dict[str, Tensor] | None:
        """-> what was saved, or None if there is no file or it is not word for word that, or not finite."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            header = read_header(path)
            if header.metadata.keys() != {"sha256"}:
                return None
            tensors = read_tensors(header)
        except FileRefused:
            return None
        whole = header.metadata["sha256"] == checksum(key, tensors)
        return tensors if whole and all_finite(tensors) else None


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors.values())


def weights_identity(module: nn.Module) -> str:
    """SHA-256 of a model's weights and their dtypes; the same model in another precision has another."""
    return tensors_identity(module.state_dict())


def tensors_identity(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} ".encode())
        _add(digest, tensor)
    return digest.hexdigest()


def checksum(words: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and what is said of them."""
    return hashlib.sha256(f"{words} {tensors_identity(tensors)}".encode()).hexdigest()


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{plain.dtype} {tuple(plain.shape)};".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
