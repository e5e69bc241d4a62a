"""Captions: `photo.txt` beside `photo.jpg`, else `photo.caption`; and what is made of them each time one is shown."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.config_data import FolderSettings

MAX_CAPTION_BYTES = 64_000  # CLIP reads 77 tokens; this is a thousand times as much
ENDINGS = (".txt", ".caption")  # in this order
_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")  # the innermost; braces without a bar are text


@dataclass(frozen=True)
class Caption:
    """`lines` that are not empty, or none; `note` is what its author should know, or empty."""

    lines: tuple[str, ...]
    note: str = ""
    unreadable: bool = False

    @property
    def text(self) -> str | None:
        """The first line."""
        return self.lines[0] if self.lines else None


def sidecar(image: Path) -> Path:
    """photo.jpg -> photo.txt, where a caption is written to"""
    return image.with_suffix(ENDINGS[0])


def sidecars(image: Path) -> list[Path]:
    """The caption files there are, the one that counts first, .TXT where there is no .txt; links that lead nowhere
    too."""
    found = []
    for end in ENDINGS:
        spellings = (image.with_suffix(end), image.with_suffix(end.upper()))
        there = [path for path in spellings if path.exists() or path.is_symlink()]
        found += there[:1]
    return found


def own_caption(image: Path) -> Caption:
    """Of the caption file that counts; without lines where there is none."""
    files = sidecars(image)
    return read_caption(files[0]) if files else Caption(())


def read_caption(path: Path) -> Caption:
    """The lines of a UTF-8 text file, with or without a byte order mark, spaces around them removed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        return _unreadable(
            f"{path.name} is not UTF-8 text (byte {problem.start}) and was not used; save it as UTF-8"
        )
    except OSError as problem:
        return _unreadable(f"{path.name} cannot be read ({problem.strerror}) and was not used")
    if len(data) > MAX_CAPTION_BYTES:
        return _unreadable(f"{path.name} is larger than {MAX_CAPTION_BYTES // 1000} kB and was not used")
    if "\0" in text:
        return _unreadable(f"{path.name} is not text and was not used")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    return Caption(lines, "" if lines else f"{path.name} is empty")


def _unreadable(why: str) -> Caption:
    return Caption((), why, unreadable=True)


# --- each time one is shown ----------------------------------------------------------------------------------


def draw(lines: Sequence[str], settings: FolderSettings, rng: random.Random) -> str:
    """One prompt out of a picture's lines, in this order: the line, wildcards, tags, trigger; or nothing at all."""
    line = lines[0] if len(lines) == 1 else rng.choice(lines)
    if settings.caption_dropout and rng.random() < settings.caption_dropout:
        return ""
    if settings.wildcards:
        line = _resolve(line, rng)
    if settings.shuffle_tags or settings.tag_dropout:
        line = _tags(line, settings, rng)
    return with_trigger(line, settings.trigger)


def with_trigger(line: str, trigger: str | None) -> str:
    """The trigger, a comma, the caption; one that has the word already, and not inside another, stays as it is."""
    if trigger is None or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", line):
        return line
    return f"{trigger}, {line}" if line else trigger


def possible(lines: Sequence[str], settings: FolderSettings, most: int) -> list[str] | None:
    """Every prompt that `draw` can make of these lines; None for more than `most`, and for tags in any order."""
    if settings.shuffle_tags or settings.tag_dropout:
        return None
    found: dict[str, None] = {"": None} if settings.caption_dropout else {}
    if settings.caption_dropout < 1:
        for line in lines:
            if settings.wildcards and line.count("|") > most:
                return None
            readings = list(itertools.islice(_readings(line), most + 1)) if settings.wildcards else [line]
            found |= dict.fromkeys(with_trigger(text, settings.trigger) for text in readings)
            if max(len(readings), len(found)) > most:
                return None
    return list(found)


def _resolve(line: str, rng: random.Random) -> str:
    if _CHOICE.search(line) is None:
        return line
    while match := _CHOICE.search(line):
        line = line[: match.start()] + rng.choice(match[1].split("|")) + line[match.end() :]
    return " ".join(line.split())  # an empty choice leaves two spaces


def _readings(line: str) -> Iterator[str]:
    match = _CHOICE.search(line)
    if match is None:
        yield line
        return
    for choice in match[1].split("|"):
        for reading in _readings(line[: match.start()] + choice + line[match.end() :]):
            yield " ".join(reading.split())


def _tags(line: str, settings: FolderSettings, rng: random.Random) -> str:
    tags = [tag for part in line.split(",") if (tag := part.strip())]
    kept, free = tags[: settings.keep_tokens], tags[settings.keep_tokens :]
    if settings.shuffle_tags:
        rng.shuffle(free)
    if settings.tag_dropout:
        free = [tag for tag in free if rng.random() >= settings.tag_dropout]
    return ", ".join([*kept, *free])
