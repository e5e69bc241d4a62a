"""Folders -> examples.

Nothing in a folder is passed over in silence: every file ends up in the `ScanReport`, as used or by name with
the reason why not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_core.errors import ConfigError
from trainers.buckets import Buckets, Size, plan_crop
from trainers.captions import read_caption, sidecars
from trainers.config_data import DatasetSettings, DataSettings
from trainers.dataset import Dataset, Example
from trainers.folders import Kind, Source, picture_files, sources
from trainers.images import (
    EXTENSIONS,
    MASK_ENDINGS,
    BadImage,
    colour_problem,
    decode_layers,
    decode_mask,
    is_animated,
    read_bytes,
)
from trainers.scan_report import ScanReport, listed

MASK_SHAPE = 0.02  # a mask's proportions may differ from its picture's by so much


def scan(
    settings: DataSettings,
    resolution: int,
    *,
    datasets: Sequence[DatasetSettings] = (),
    report: Callable[[ScanReport], None] | None = None,
) -> Dataset:
    """Open every picture once. `report` hears of each folder, also of one that is then refused.

    `datasets`: the folders; left out: the one of `settings`. `resolution` is that of folders without one of their own.
    Raises ConfigError: no folder, no pictures, more than half of them bad (with bad_images = "refuse": one),
    or pictures without any words.
    """
    found: dict[Kind, list[Example]] = {"instance": [], "class": []}
    reports = []
    every = sources(datasets or (settings.as_dataset(),))
    elsewhere = {path for s in every for path in (s.folder, s.settings.masks) if path is not None}
    for source in every:
        own = source.settings.resolution or resolution
        several = source.settings.more_resolutions if source.kind == "instance" else ()
        buckets = [Buckets.of(settings, side) for side in dict.fromkeys((own, *several))]
        asked = _Asked(source, buckets, settings.bad_images == "refuse", elsewhere)
        examples, notes = _scan_folder(asked, report)
        found[source.kind] += examples
        if not source.around or notes.used or notes.bad or notes.other:
            reports.append(notes)
    return Dataset(tuple(found["instance"]), tuple(found["class"]), tuple(reports), resolution)


@dataclass(frozen=True)
class _Asked:
    """One folder to read. `elsewhere`: folders that are read for themselves, which may lie in it."""

    source: Source
    buckets: Sequence[Buckets]
    refuse: bool
    elsewhere: set[Path]


def _scan_folder(
    asked: _Asked, report: Callable[[ScanReport], None] | None
) -> tuple[list[Example], ScanReport]:
    source = asked.source
    folder = source.folder
    try:
        pictures, entries = picture_files(folder), sorted(folder.iterdir())
    except OSError as problem:
        raise ConfigError(f"{source.setting} ({folder}) cannot be read: {problem.strerror}.") from problem
    notes, found = ScanReport(folder), _Found()
    examples: list[Example] = []
    wordless = 0
    for path in pictures:
        try:
            seen = _measure(path, source)
        except BadImage as problem:
            notes.bad[path.name] = problem.reason
            found.captions.update(p.name for p in sidecars(path) if source.own_words)
            continue
        variants = source.settings.caption_lines == "variants"
        lines = _words(path, notes, found, variants=variants) if source.own_words else ()
        if not lines:
            if source.own_words:
                notes.uncaptioned.append(path.name)
            lines = (source.prompt,) if source.prompt is not None else ()
        if not lines and source.settings.trigger is not None:
            lines = ("",)
        wordless += not lines
        notes.take(path.name, animated=seen.animated, masked=seen.masked if source.masked else None)
        if seen.colours:
            notes.colours[path.name] = seen.colours
        if seen.mask is not None and seen.mask.parent == folder:
            found.masks.add(seen.mask.name)
        # where nothing is enlarged, a small picture is the same at several resolutions: once then
        for plan in dict.fromkeys(plan_crop(seen.size, bucket.fit(seen.size)) for bucket in asked.buckets):
            notes.place(path.name, seen.size, plan)
            if lines:  # else it is in notes.uncaptioned, and refused below with the others
                examples.append(Example(path, lines, seen.size, plan, source, seen.masked, seen.mask))
    read = {p.name for p in pictures} | found.captions | found.masks
    notes.other.extend(
        p.name + "/" * p.is_dir() for p in entries if p.name not in read and p not in asked.elsewhere
    )
    notes.shared = {name: users for name, users in found.users.items() if len(users) > 1}
    nothing = not (notes.used or notes.bad)
    if report is not None and not (source.around and nothing and not notes.other):
        report(notes)
    if not (source.around and nothing):
        _refuse(notes, source, asked.refuse, complete=not wordless)
    return examples, notes


class _Found:
    """Files of a folder that belong to pictures."""

    def __init__(self) -> None:
        self.captions: set[str] = set()
        self.masks: set[str] = set()
        self.users: dict[str, list[str]] = {}  # of each caption file


@dataclass(frozen=True)
class _Seen:
    size: Size
    animated: bool
    colours: str
    masked: bool
    mask: Path | None


def _measure(path: Path, source: Source) -> _Seen:
    """Decode to the last pixel. Raises BadImage, also for a mask that does not fit."""
    if not _inside(path, source.folder):
        raise BadImage(path, "it is a link to a file outside the folder; copy the file itself here")
    data = read_bytes(path)
    image, opacity = decode_layers(data, path, managed=False)
    file = _mask_file(path, source.settings.masks) if source.masked else None
    mask = decode_mask(read_bytes(file), file) if file is not None else opacity
    if source.masked and mask is not None:
        _check_mask(mask, image.size, path, file)
    masked = source.masked and mask is not None
    return _Seen(image.size, is_animated(data, path), colour_problem(data, path), masked, file)


def _mask_file(path: Path, masks: Path | None) -> Path | None:
    """photo.jpg -> photo.mask.png or photo-masklabel.png beside it, or photo.* in the folder of masks."""
    kinds = (*EXTENSIONS, *(kind.upper() for kind in EXTENSIONS))
    beside = [path.with_name(path.stem + end + kind) for end in MASK_ENDINGS for kind in kinds]
    apart = [] if masks is None else [masks / (path.stem + kind) for kind in kinds]
    return next((p for p in (*beside, *apart) if p.is_file() and _inside(p, p.parent)), None)


def _check_mask(mask: Image.Image, size: Size, path: Path, file: Path | None) -> None:
    name = "its transparency" if file is None else file.name
    if mask.getextrema() == (0, 0):
        raise BadImage(path, f"{name} leaves nothing of it to learn: the mask is black everywhere")
    if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > MASK_SHAPE:
        raise BadImage(
            path,
            f"{name} has another shape ({mask.width} x {mask.height}) than the picture ({size[0]} x {size[1]})",
        )


def _inside(path: Path, folder: Path) -> bool:
    """Whether the file is in the folder once links are followed; one that leads in a circle is nowhere."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return False


def _words(image: Path, notes: ScanReport, found: _Found, *, variants: bool) -> tuple[str, ...]:
    """The picture's own captions, if it has any; what is odd about them goes into the notes."""
    files = sidecars(image)
    if not files:
        return ()
    path, *others = files
    found.captions.add(path.name)
    found.users.setdefault(path.name, []).append(image.name)
    for other in others:
        notes.captions[other.name] = f"{other.name} was not read: {path.name} comes first"
        found.captions.add(other.name)
    if not _inside(path, image.parent):
        notes.captions[path.name] = f"{path.name} is a link to a file outside the folder and was not read"
        return ()
    caption = read_caption(path)
    if caption.note:
        notes.captions[path.name] = caption.note
    if caption.unreadable:
        notes.unreadable.append(path.name)
    if len(caption.lines) > 1:
        use = "one is drawn each time" if variants else "the first is the caption"
        notes.captions[path.name] = f"{path.name} has {len(caption.lines)} lines; {use}"
    return caption.lines if variants else caption.lines[:1]


def _refuse(notes: ScanReport, source: Source, refuse: bool, *, complete: bool) -> None:
    """Raise ConfigError unless the folder is good enough to train on."""
    where = f"{source.setting} ({notes.folder})"
    if not notes.used and not notes.bad:
        there = f"Found there: {listed(notes.other)}." if notes.other else "The folder is empty."
        raise ConfigError(f"{where} holds no pictures. Read are {', '.join(EXTENSIONS)}. {there}")
    bad, total = len(notes.bad), len(notes.bad) + len(notes.used)
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in notes.bad.items())
    if bad and refuse:
        raise ConfigError(
            f'{bad} of {total} pictures in {where} cannot be used, and data.bad_images = "refuse":{reasons}'
        )
    if notes.unreadable and refuse:
        said = "".join(f"\n  {notes.captions[name]}" for name in notes.unreadable)
        raise ConfigError(f'Captions in {where} cannot be read, and data.bad_images = "refuse":{said}')
    if 2 * bad > total:
        raise ConfigError(
            f"{bad} of {total} pictures in {where} cannot be used. That is more than half, so something is "
            f"wrong with the folder; mend or remove these:{reasons}"
        )
    if not complete:
        said = "".join(f" {notes.captions[name]}." for name in notes.unreadable)
        raise ConfigError(
            f"Pictures in {where} have no caption, and data.prompt is not set: {listed(notes.uncaptioned)}. "
            f"Set data.prompt, or write a .txt file beside each.{said}"
        )
