"""Which folders are read, and what each says of its pictures: a preset's own, and kohya's inside them.

photos/             images = "photos": its pictures, once each
kohya/10_sks dog/   images = "kohya": these, ten times each, with "sks dog" as prompt
kohya/1_dog/        ... and these, once, with "dog"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_core.errors import ConfigError
from trainers.config_data import DatasetSettings
from trainers.images import EXTENSIONS, is_mask

Kind = Literal["instance", "class"]
_KOHYA = re.compile(r"(\d{1,3})_(.*\S.*)")  # four digits are a year


@dataclass(frozen=True)
class Source:
    """One folder whose pictures are treated alike. `prompt` is that of pictures without a caption."""

    folder: Path
    kind: Kind
    settings: DatasetSettings
    prompt: str | None
    repeats: int
    setting: str  # that named it, for messages
    around: bool = False  # kohya's folders are inside, so it may have no pictures of its own

    @property
    def own_words(self) -> bool:
        """Whether caption files are read."""
        return self.settings.captions and self.kind == "instance"

    @property
    def masked(self) -> bool:
        return self.settings.masked_loss and self.kind == "instance"

    @property
    def weight(self) -> float:
        """In the loss; the prior's own weight is on top of it."""
        return self.settings.weight if self.kind == "instance" else 1.0


def sources(datasets: Sequence[DatasetSettings]) -> list[Source]:
    """Every folder to read, those to learn first; class folders that several name, once. Raises ConfigError."""
    found: list[Source] = []
    table = "data" if len(datasets) == 1 else "dataset"
    for settings in datasets:
        own = settings.prompt, settings.repeats, f"{table}.images"
        found += _expand(Source(settings.images, "instance", settings, *own))
    classes: dict[tuple[Path, str | None], Source] = {}
    for settings in datasets:
        if settings.class_images is not None:
            key = settings.class_images, settings.class_prompt
            own = settings.class_prompt, 1, f"{table}.class_images"
            classes.setdefault(key, Source(settings.class_images, "class", settings, *own))
    for source in classes.values():
        found += _expand(source)
    return found


def picture_files(folder: Path) -> list[Path]:
    """Files in `folder` whose name says picture, sorted by name; none if there is no folder. Masks are none, nor is
    what macOS puts beside a picture on foreign disks, by its name and a "._" before it."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _is_picture(p) and not p.is_dir())


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith("._") and not is_mask(path)


def kohya_folders(folder: Path) -> list[tuple[Path, int, str]]:
    """Folders inside named repeats_prompt -> (folder, repeats, prompt), by name."""
    found = []
    for path in sorted(folder.iterdir()):
        match = _KOHYA.fullmatch(path.name)
        if match and path.is_dir() and path.resolve().is_relative_to(folder.resolve()):
            found.append((path, int(match[1]), match[2].strip()))
    return found


def _expand(source: Source) -> list[Source]:
    """A folder of kohya's folders -> these, and before them the folder itself, for what lies beside them."""
    folder, setting = source.folder, source.setting
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{setting} must be a folder with pictures, but {folder} {found}.")
    try:
        inside = kohya_folders(folder)
    except OSError as problem:
        raise ConfigError(f"{setting} ({folder}) cannot be read: {problem.strerror}.") from problem
    if not inside:
        return [source]
    parts = [replace(source, around=True)]
    for path, repeats, prompt in inside:
        if repeats == 0:
            raise ConfigError(
                f"{path} asks for 0 repeats. Name it 1_{prompt}, or move it out of {folder.name}."
            )
        parts.append(replace(source, folder=path, prompt=prompt, repeats=repeats * source.repeats))
    return parts
