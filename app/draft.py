"""The pictures being gathered for a training: a folder of files and captions that the page edits.

A run needs its pictures for as long as it may be resumed, so it gets a folder of its own (hard links where the disk
has them: no second copy), and the draft stays for the next one. Captions are replaced, never written into, so that a
link to the old one keeps its words.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_core.errors import ConfigError, LoraError
from lora_core.safe_writes import copy_atomic, write_atomic
from trainers.captions import own_caption, sidecar, sidecars
from trainers.folders import picture_files
from trainers.images import EXTENSIONS, open_image


@dataclass(frozen=True)
class Entry:
    path: Path
    caption: str


class Draft:
    def __init__(self, root: Path) -> None:
        self.root, self.folder = root.absolute(), root.absolute() / "draft"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.revision = 0

    def add(self, files: Sequence[tuple[Path, str]]) -> list[str]:
        """Uploaded files (where they lie, their names) -> problems, one sentence each. Pictures are opened before
        they are taken, text files are captions."""
        problems = []
        for path, name in files:
            try:
                if Path(name).suffix.lower() in EXTENSIONS:
                    open_image(path)
                elif Path(name).suffix.lower() != ".txt":
                    raise LoraError(
                        f"{name} is neither a picture ({', '.join(EXTENSIONS)}) nor a .txt caption."
                    )
                copy_atomic(path, self.folder / _plain_name(name))
            except LoraError as problem:
                problems.append(str(problem).replace(path.name, name))
        self.revision += 1
        return problems

    def entries(self) -> list[Entry]:
        found = picture_files(self.folder)
        return [Entry(p, "\n".join(own_caption(p).lines)) for p in found]

    def find(self, name: str) -> Path | None:
        """The picture of this name; None where there is none (any longer)."""
        path = self.folder / _plain_name(name)
        return path if path.suffix.lower() in EXTENSIONS and path.is_file() else None

    def caption(self, name: str, text: str) -> None:
        """An empty text takes the caption off, so that the picture has the prompt of all. A late word about a picture
        that was taken out is about nothing."""
        picture = self.folder / _plain_name(name)
        path = sidecar(picture)
        if text.strip() and picture.exists():
            lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
            write_atomic(path, lambda target: _write(target, "\n".join(lines) + "\n"))
        else:
            path.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        picture = self.folder / _plain_name(name)
        for path in (picture, *sidecars(picture)):
            path.unlink(missing_ok=True)
        self.revision += 1

    def clear(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.revision += 1

    def freeze(self, name: str) -> Path:
        """A folder with the pictures as they are now, for one run."""
        if not self.entries():
            raise ConfigError("There is no picture to learn from. Drop 4 to 20 pictures of one subject.")
        number, target = 1, self.root / name
        while target.exists():
            number += 1
            target = self.root / f"{name}-{number}"
        shutil.copytree(self.folder, target, copy_function=_link)
        return target


def _plain_name(name: str) -> str:
    """No folder, nothing hidden: a name that the browser sent."""
    plain = Path(name.replace("\\", "/")).name.lstrip(".")
    if not plain:
        raise LoraError(f'"{name}" is no name for a file.')
    return plain


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
