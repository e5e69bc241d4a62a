"""Mixes kept by name: `Mixes/NAME.toml` below the models' folder (lora_core/named_mixes.py has the spelling)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from app.safe_names import is_inside, safe_name
from lora_core.errors import ConfigError, LoraError, did_you_mean
from lora_core.mix import Mix
from lora_core.named_mixes import read_mix, save_mix
from lora_core.plain_text import plain
from lora_core.safe_writes import sweep_partials, write_atomic

SUFFIX = ".toml"
State = tuple[str, int, int]  # name, mtime_ns, size


@dataclass(frozen=True)
class SavedMix:
    """`files` has each LoRA's file as a path below the LoRA folder; `problem` is "" or why it cannot be worn."""

    name: str
    path: Path
    mix: Mix = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    problem: str = ""


class Mixes:
    """Safe to ask from several threads. What somebody else puts into the folder is found at the next look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep_partials(self.folder)
        self._read: dict[State, SavedMix] = {}
        self._deleted: tuple[str, bytes] | None = None
        self._lock = threading.RLock()

    def all(self) -> list[SavedMix]:
        """By name; one that cannot be read is there with the reason. A file is read once for each state of it."""
        with self._lock:
            known, self._read = self._read, {}
            for path in self.folder.glob(f"*{SUFFIX}"):
                if path.name.startswith(".") or not is_inside(path, self.folder):
                    continue
                with suppress(FileNotFoundError):  # deleted by somebody between two looks
                    stat = path.stat()
                    state = (path.name, stat.st_mtime_ns, stat.st_size)
                    self._read[state] = known.get(state) or _read(path)
            return sorted(self._read.values(), key=lambda saved: (saved.name.casefold(), saved.name))

    def find(self, name: str) -> SavedMix:
        """Raises LoraError for one that is not there, with the nearest name, or that cannot be read."""
        saved = {found.name: found for found in self.all()}
        if name not in saved:
            raise LoraError(f'No mix named "{plain(name)}" is saved.{did_you_mean(name, saved)}')
        if saved[name].problem:
            raise LoraError(saved[name].problem)
        return saved[name]

    def save(self, name: str, mix: Mix, files: Mapping[str, str]) -> str:
        """In the place of one of this name, if there is one -> the name as it can be a file's. Raises LoraError."""
        if not name.strip():
            raise ConfigError("The mix has no name yet. Give it one, such as: soft ink.")
        kept = safe_name(name, fallback="mix")
        with self._lock:
            taken = {path.stem.casefold(): path.stem for path in self.folder.glob(f"*{SUFFIX}")}
            kept = taken.get(kept.casefold(), kept)  # some disks do not tell Ink from ink
            save_mix(self._path(kept), mix, files=files)
        return kept

    def delete(self, name: str) -> None:
        """`restore` brings back what was deleted last. One that has gone already is no fault."""
        with self._lock:
            path = next((saved.path for saved in self.all() if saved.name == name), None)
            if path is None:
                return
            try:
                self._deleted = (path.stem, path.read_bytes())
                path.unlink()
            except OSError as problem:
                raise LoraError(f"{path} cannot be deleted: {problem.strerror}.") from problem

    @property
    def deleted(self) -> str:
        """The name of the mix that `restore` would bring back, or ""."""
        return plain(self._deleted[0], 200) if self._deleted else ""

    def restore(self) -> None:
        with self._lock:
            if self._deleted is None:
                return
            name, content = self._deleted
            if self._path(name).exists():
                raise LoraError(f'There is a mix named "{name}" again. Delete that one first.')
            write_atomic(self._path(name), lambda target: _write(target, content))
            self._deleted = None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"


def _read(path: Path) -> SavedMix:
    name = plain(path.stem, 200)
    try:
        return SavedMix(name, path, *read_mix(path))
    except ConfigError as problem:
        return SavedMix(name, path, problem=plain(problem, 500))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
