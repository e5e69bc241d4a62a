"""Captions: `photo.txt` beside `photo.jpg`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_CAPTION_BYTES = 64_000  # CLIP reads 77 tokens; this is a thousand times as much


@dataclass(frozen=True)
class Caption:
    """`text`, or None where the file gives none; `note` is what its author should know, or empty."""

    text: str | None
    note: str = ""


def sidecar(image: Path) -> Path:
    """photo.jpg -> photo.txt"""
    return image.with_suffix(".txt")


def read_caption(path: Path) -> Caption:
    """The first line of a UTF-8 text file, with or without a byte order mark, spaces around it removed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        return Caption(
            None, f"{path.name} is not UTF-8 text (byte {problem.start}) and was not used; save it as UTF-8"
        )
    except OSError as problem:
        return Caption(None, f"{path.name} cannot be read ({problem.strerror}) and was not used")
    if len(data) > MAX_CAPTION_BYTES:
        return Caption(None, f"{path.name} is larger than {MAX_CAPTION_BYTES // 1000} kB and was not used")
    if "\0" in text:
        return Caption(None, f"{path.name} is not text and was not used")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return Caption(None, f"{path.name} is empty")
    note = f"{path.name} has {len(lines)} lines; the first is the caption" if len(lines) > 1 else ""
    return Caption(lines[0], note)
