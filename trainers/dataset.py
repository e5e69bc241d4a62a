"""Folders -> examples -> tensors, in an order that can be taken up again anywhere.

Nothing in a folder is passed over in silence: every file ends up in the `ScanReport`, as used or by name with
the reason why not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_core.errors import ConfigError
from trainers.buckets import CropPlan, Size, View, apply, plan_crop
from trainers.captions import read_caption, sidecar
from trainers.config_data import DataSettings
from trainers.images import EXTENSIONS, BadImage, decode, is_animated, open_image, read_bytes
from trainers.scan_report import ScanReport, listed

Kind = Literal["instance", "class"]


@dataclass(frozen=True)
class Example:
    """One picture to train on. `original_size` is width and height after EXIF; `plan` is the centre crop."""

    path: Path
    caption: str
    original_size: Size
    kind: Kind
    plan: CropPlan


@dataclass(frozen=True)
class Dataset:
    """What `scan` found: examples in the order of their names, and one report per folder."""

    instances: tuple[Example, ...]
    classes: tuple[Example, ...]
    reports: tuple[ScanReport, ...]
    resolution: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.instances + self.classes

    def views(self, example: Example) -> tuple[View, ...]:
        """Every view a cache has to hold. Raises ConfigError for random crops, which have no end."""
        if self.crop == "random":
            raise ConfigError(
                'Latents of data.crop = "random" cannot be kept: set train.cache_latents = false.'
            )
        return tuple(View(example.plan, flip) for flip in ((False, True) if self.flip else (False,)))

    def view(self, example: Example, rng: random.Random) -> View:
        """One of the views, as the settings and `rng` (see `Draw.rng`) have it."""
        random_crop = self.crop == "random"
        plan = plan_crop(example.original_size, self.resolution, rng) if random_crop else example.plan
        return View(plan, self.flip and rng.random() < 0.5)

    def pixels(self, example: Example, view: View) -> Tensor:
        """-> (3, resolution, resolution), -1 to 1."""
        return pixels(open_image(example.path), view)


def pixels(image: Image.Image, view: View) -> Tensor:
    """An opened picture -> its view as (3, side, side) fp32, -1 to 1."""
    square = torch.from_numpy(np.array(apply(image, view)))  # (side, side, 3) uint8
    return square.permute(2, 0, 1).float() / 127.5 - 1


def scan(
    settings: DataSettings, resolution: int, *, report: Callable[[ScanReport], None] | None = None
) -> Dataset:
    """Open every picture once. `report` hears of each folder, also of one that is then refused.

    Raises ConfigError: no folder, no pictures, more than half of them bad (with bad_images = "refuse": one),
    or pictures without any words.
    """
    instances, first = _scan_folder(settings.images, "instance", settings, resolution, report)
    classes: tuple[Example, ...] = ()
    reports = [first]
    if settings.class_images is not None:
        classes, second = _scan_folder(settings.class_images, "class", settings, resolution, report)
        reports.append(second)
    return Dataset(instances, classes, tuple(reports), resolution, settings.crop, settings.flip)


def picture_files(folder: Path) -> list[Path]:
    """Files in `folder` whose name says picture, sorted by name; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.is_dir())


def _scan_folder(
    folder: Path,
    kind: Kind,
    settings: DataSettings,
    resolution: int,
    report: Callable[[ScanReport], None] | None,
) -> tuple[tuple[Example, ...], ScanReport]:
    setting = "data.images" if kind == "instance" else "data.class_images"
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{setting} must be a folder with pictures, but {folder} {found}.")
    try:
        pictures, entries = picture_files(folder), sorted(folder.iterdir())
    except OSError as problem:
        raise ConfigError(f"{setting} ({folder}) cannot be read: {problem.strerror}.") from problem
    notes = ScanReport(folder)
    own_words = settings.captions and kind == "instance"
    examples = []
    for path in pictures:
        try:
            size, animated = _measure(path, folder)
        except BadImage as problem:
            notes.bad[path.name] = problem.reason
            continue
        caption = _words(path, notes) if own_words else None
        if caption is None:
            if own_words:
                notes.uncaptioned.append(path.name)
            caption = settings.class_prompt if kind == "class" else settings.prompt
        if animated:
            notes.animated.append(path.name)
        if min(size) < resolution:
            notes.enlarged.append(path.name)
        notes.used.append(path.name)
        if caption is not None:  # else it is in notes.uncaptioned, and refused below with the others
            examples.append(Example(path, caption, size, kind, plan_crop(size, resolution)))
    read = {p.name for p in pictures} | ({sidecar(p).name for p in pictures} if own_words else set())
    notes.other.extend(p.name + "/" * p.is_dir() for p in entries if p.name not in read)
    if report is not None:
        report(notes)
    _refuse(notes, setting, settings, complete=len(examples) == len(notes.used))
    return tuple(examples), notes


def _measure(path: Path, folder: Path) -> tuple[Size, bool]:
    """Decode to the last pixel -> (width, height) and whether there are more frames. Raises BadImage."""
    if not _inside(path, folder):
        raise BadImage(path, "it is a link to a file outside the folder; copy the file itself here")
    data = read_bytes(path)
    return decode(data, path).size, is_animated(data, path)


def _inside(path: Path, folder: Path) -> bool:
    """Whether the file is in the folder once links are followed; one that leads in a circle is nowhere."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return False


def _words(image: Path, notes: ScanReport) -> str | None:
    """The picture's own caption, if it has one; what is odd about it goes into the notes."""
    path = sidecar(image)
    if not path.exists() and not path.is_symlink():
        return None
    if not _inside(path, image.parent):
        notes.captions[path.name] = f"{path.name} is a link to a file outside the folder and was not read"
        return None
    caption = read_caption(path)
    if caption.note:
        notes.captions[path.name] = caption.note
    return caption.text


def _refuse(notes: ScanReport, setting: str, settings: DataSettings, *, complete: bool) -> None:
    """Raise ConfigError unless the folder is good enough to train on."""
    where = f"{setting} ({notes.folder})"
    if not notes.used and not notes.bad:
        there = f"Found there: {listed(notes.other)}." if notes.other else "The folder is empty."
        raise ConfigError(f"{where} holds no pictures. Read are {', '.join(EXTENSIONS)}. {there}")
    bad, total = len(notes.bad), len(notes.bad) + len(notes.used)
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in notes.bad.items())
    if bad and settings.bad_images == "refuse":
        raise ConfigError(
            f'{bad} of {total} pictures in {where} cannot be used, and data.bad_images = "refuse":{reasons}'
        )
    if 2 * bad > total:
        raise ConfigError(
            f"{bad} of {total} pictures in {where} cannot be used. That is more than half, so something is "
            f"wrong with the folder; mend or remove these:{reasons}"
        )
    if not complete:
        raise ConfigError(
            f"Pictures in {where} have no caption, and data.prompt is not set: {listed(notes.uncaptioned)}. "
            "Set data.prompt, or write a .txt file beside each."
        )


@dataclass(frozen=True)
class Draw:
    """One example's turn: `index` into the examples, `number` since the run began."""

    index: int
    number: int
    seed: int

    def rng(self) -> random.Random:
        """For this turn's crop and flip: the same whenever and wherever it is asked for."""
        return random.Random(f"draw {self.seed} {self.number}")


class Sampler:
    """Draws without end: every epoch all examples once, shuffled anew.

    The order is a function of (seed, epoch), so one number is the whole state, in mid-epoch too.
    """

    def __init__(self, count: int, *, seed: int, number: int = 0) -> None:
        if count < 1:
            raise ValueError("a sampler needs at least one example")
        self.count, self.seed, self.number = count, seed, number

    def take(self, n: int) -> list[Draw]:
        """The next n draws."""
        numbers = range(self.number, self.number + n)
        self.number += n
        return [
            Draw(_order(self.seed, i // self.count, self.count)[i % self.count], i, self.seed)
            for i in numbers
        ]

    @property
    def epoch(self) -> int:
        """Of the next draw, from 0."""
        return self.number // self.count

    def state(self) -> dict[str, int]:
        return {"count": self.count, "seed": self.seed, "number": self.number}

    @classmethod
    def from_state(cls, state: dict[str, int], *, count: int) -> Sampler:
        """Go on where `state` was taken. Raises ConfigError if there are now other than as many examples."""
        if state["count"] != count:
            raise ConfigError(
                f"The run was saved with {state['count']} pictures and now there are {count}: it cannot go "
                "on in the same order. Put the folder back as it was, or start a new run from its LoRA "
                "(lora.start_from)."
            )
        return cls(count, seed=state["seed"], number=state["number"])


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)
