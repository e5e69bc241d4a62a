"""LoRAs and base models on disk: `Lora` and `Stable-diffusion` below one folder, as A1111 names them.

Facts come from the files' headers alone, read once per file and state of it. A file that cannot be used is listed
with the reason: what is there and not shown is looked for in vain.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from app.safe_names import is_inside, safe_name
from lora_core.adapter import COMPONENTS
from lora_core.duplicates import digest_of, duplicates, likeness
from lora_core.errors import FileRefused, LoraError, did_you_mean
from lora_core.families import FAMILIES
from lora_core.formats import describe_adapter
from lora_core.formats.said import facts_said, trigger_words
from lora_core.looking import Look, look
from lora_core.plain_text import plain
from lora_core.safe_files import read_header, sweep_partials, write_atomic
from lora_core.safe_header import PICKLE_NAMES

SUFFIX = ".safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEMO_BASE = ("Demo model (included)", "demo")
State = tuple[tuple[str, int, int], ...]  # (path, mtime_ns, size) of all the files that are one LoRA


@dataclass(frozen=True)
class LoraFile:
    """One LoRA of the library. `name` is its path below the folder without the suffix: one LoRA, one name.

    All text but `path` is foreign, with control characters removed and cut to a line. `base_model` is what it
    says it was trained on; `problem` is "" or why it cannot be used.
    """

    name: str
    path: Path
    family: str | None = None
    family_title: str = ""
    layers: int = 0
    ranks: tuple[int, ...] = ()
    size_bytes: int = 0
    triggers: tuple[str, ...] = ()
    base_model: str = ""
    problem: str = ""


class Library:
    """The files below `root`. Safe to ask from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.lora_folder, self.base_folder = self.root / "Lora", self.root / "Stable-diffusion"
        for folder in (self.lora_folder, self.base_folder):
            folder.mkdir(parents=True, exist_ok=True)
        sweep_partials(self.lora_folder)
        self._facts: dict[State, LoraFile] = {}
        self._hashes: dict[State, str] = {}
        self._lock = threading.RLock()

    def loras(self) -> list[LoraFile]:
        """All of them, in subfolders too, by name; those that cannot be used with their problem. Names that begin
        with a dot are other programs' business."""
        with self._lock:
            known, self._facts = self._facts, {}
            for path in _lora_paths(self.lora_folder):
                state = _state(path)
                self._facts[state] = known.get(state) or self._read(path)
            return _numbered(self._facts.values())

    def find(self, name: str) -> LoraFile:
        """Raises LoraError, with the nearest name there is."""
        files = {file.name: file for file in self.loras()}
        if name not in files:
            hint = did_you_mean(name, files)
            raise LoraError(
                f'"{plain(name)}" is not in the library.{hint if len(hint) < 400 else ""} Drop its file onto the '
                "page to add it."
            )
        return files[name]

    def bases(self) -> list[tuple[str, str]]:
        """(title, source for open_base): the demo, then the files and diffusers folders of Stable-diffusion.

        Whether one can be used is said when it is opened. Links that lead out of the folder are left out."""
        found = [p for p in _base_paths(self.base_folder) if is_inside(p, self.base_folder)]
        titled = [(_name(path, self.base_folder), str(path)) for path in found]
        return [DEMO_BASE, *sorted(titled, key=lambda pair: pair[0].casefold())]

    def import_file(self, uploaded: Path, filename: str) -> LoraFile:
        """Put an uploaded file into the library under a safe form of `filename` -> the LoRA.

        It is checked where it lies and moves only if it is one. If the same LoRA is there already, under any
        name, that one is returned and the upload removed. Raises FileRefused, in one sentence; SaveFailed.
        """
        shown = plain(re.split(r"[/\\]", filename)[-1]) or "The file"
        try:
            _check(uploaded, filename)
            describe_adapter(uploaded)
        except FileRefused as problem:
            raise FileRefused(str(problem).replace(uploaded.name, shown)) from problem
        with self._lock:
            if same := self._same(uploaded):
                uploaded.unlink(missing_ok=True)
                return same
            target = self._free(safe_name(filename[: -len(SUFFIX)]))
            mode = (
                stat.S_IMODE(self.lora_folder.stat().st_mode) & 0o666
            )  # uploads are readable by nobody else

            def move(partial: Path) -> None:
                shutil.move(uploaded, partial)
                partial.chmod(mode)

            write_atomic(target, move, needed=uploaded.stat().st_size)
            return next(file for file in self.loras() if file.path == target)

    def _read(self, path: Path) -> LoraFile:
        name, size = _name(path, self.lora_folder), sum(size for _, _, size in _state(path))
        bare = LoraFile(plain(name, 200), path, size_bytes=size)
        files = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
        if not all(is_inside(file, self.lora_folder) for file in (path, *files)):
            return replace(
                bare,
                problem=f"{plain(path.name)} is a link that leads out of {self.lora_folder.name}, or nowhere. Put the "
                "file itself there.",
            )
        if path.is_dir() and path.is_symlink():
            return replace(bare, problem=f"{plain(path.name)} is a link to a folder of this library.")
        found = look(path)
        if found.facts is None:
            return replace(bare, problem=plain(found.problem, 500))
        family = found.facts.family
        return replace(
            bare,
            family=family,
            family_title=FAMILIES[family].title if family else "unknown family",
            layers=found.facts.layers,
            ranks=tuple(sorted(found.facts.ranks)),
            triggers=trigger_words(found.metadata),
            base_model=plain(facts_said(found.metadata).get("base_model", "").removesuffix(SUFFIX)),
        )

    def _same(self, uploaded: Path) -> LoraFile | None:
        """The LoRA that this one is."""
        new, files = look(uploaded), {file.path: file for file in self.loras() if not file.problem}
        alike = [found for path in files if (found := look(path)).facts and likeness(found) == likeness(new)]
        same = next((group for group in duplicates([new, *alike], self._digest) if new in group), ())
        return next((files[found.path] for found in same if found is not new), None)

    def _digest(self, found: Look) -> str:
        """Read once for each state of a file: there may be hundreds alike."""
        state = _state(found.path)
        self._hashes[state] = self._hashes.get(state) or digest_of(found)
        return self._hashes[state]

    def _free(self, name: str) -> Path:
        """A name that no file has, on disks that do not tell Cat from cat either."""
        taken = {entry.name.casefold() for entry in self.lora_folder.iterdir()}
        number, candidate = 1, name
        while f"{candidate}{SUFFIX}".casefold() in taken:
            number += 1
            candidate = f"{name}-{number}"
        return self.lora_folder / f"{candidate}{SUFFIX}"


def _check(uploaded: Path, filename: str) -> None:
    """Raises FileRefused for what is no plain .safetensors file."""
    if uploaded.is_symlink():
        raise FileRefused(f"{uploaded.name} is a link; the file itself was expected.")
    read_header(uploaded)
    if not filename.lower().endswith(SUFFIX):
        raise FileRefused(
            f"{uploaded.name} does not end in {SUFFIX}; LoRAs are read from {SUFFIX} files alone. Rename it if it "
            "is one."
        )


def _name(path: Path, folder: Path) -> str:
    """Only .safetensors goes without saying."""
    below = path.relative_to(folder).as_posix()
    return below[: -len(SUFFIX)] if below.lower().endswith(SUFFIX) and not path.is_dir() else below


def _numbered(files: Iterable[LoraFile]) -> list[LoraFile]:
    """By name, and no name twice: cat.safetensors, cat.SAFETENSORS and a folder named cat are three."""
    listed: dict[str, LoraFile] = {}
    for file in sorted(files, key=lambda f: (f.name.casefold(), f.name, f.path.is_dir(), str(f.path))):
        name, number = file.name, 1
        while name in listed:
            number += 1
            name = f"{file.name} ({number})"
        listed[name] = replace(file, name=name)
    return list(listed.values())


def _state(path: Path) -> State:
    """What a LoRA's files look like from outside; when it changes, they are read again."""
    files = (
        sorted(p for p in path.rglob("*") if p.is_file())
        if path.is_dir() and not path.is_symlink()
        else [path]
    )
    facts = []
    for file in files:
        try:
            found = file.stat()
        except OSError:
            found = file.lstat()  # a link that leads nowhere
        facts.append((str(file), found.st_mtime_ns, found.st_size))
    return tuple(facts) or ((str(path), 0, 0),)


def _lora_paths(folder: Path) -> Iterator[Path]:
    """Files, folders of PEFT's that are one LoRA each, and links to folders, which are not followed."""
    for where, folders, files in os.walk(folder):
        here = Path(where)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (here / name for name in folders if (here / name).is_symlink())
        below = here != folder
        if below and _is_peft(here) and not (here.name in COMPONENTS and here.parent != folder):
            yield here
        for name in files:
            in_folder = below and name == PEFT_WEIGHTS and PEFT_CONFIG in files
            if name.lower().endswith((SUFFIX, *PICKLE_NAMES)) and name[0] != "." and not in_folder:
                yield here / name


def _is_peft(folder: Path) -> bool:
    parts = [folder, *(folder / component for component in COMPONENTS)]
    return any((part / PEFT_CONFIG).is_file() and (part / PEFT_WEIGHTS).is_file() for part in parts)


def _base_paths(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        if "model_index.json" in files:
            folders.clear()
            yield Path(where)
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where, name) for name in files if name.lower().endswith(SUFFIX) and name[0] != ".")
