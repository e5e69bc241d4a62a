"""Names that come from outside, made fit for a file here: on Linux, macOS and Windows alike."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from lora_core.plain_text import LONGEST, UNSEEN

LONGEST_BYTES = 200  # most file systems take 255; the rest is for a number and the suffix
JOINERS = "\u200d\ufe0f"  # inside an emoji, and nowhere else
_PUNCTUATION = frozenset(" .-_()+,&'!@#=[]")
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


def safe_name(text: str, *, fallback: str = "lora") -> str:
    """A file's name (without its suffix) that keeps of `text` what is harmless: letters and digits of every
    script, emoji, a little punctuation.

    >>> safe_name("../../etc/my cat: v2?")
    'my cat_ v2_'
    """
    text = unicodedata.normalize("NFC", re.split(r"[/\\]", text)[-1])
    kept = "".join(_kept(character, text[i - 1 : i]) for i, character in enumerate(text))
    kept = re.sub(r"\s+", " ", re.sub(r"_{2,}", "_", kept)).strip(" .-")
    kept = unicodedata.normalize("NFC", kept[:LONGEST].encode()[:LONGEST_BYTES].decode(errors="ignore"))
    kept = kept.rstrip(f" .{JOINERS}")
    if _DEVICE.match(kept):
        kept = f"_{kept}"[:LONGEST].rstrip(" .")
    return kept if kept.strip("_") else fallback


def is_inside(path: Path, root: Path) -> bool:
    """Whether `path` really lies below `root`, links followed. A path that leads nowhere does not."""
    try:
        return path.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def _kept(character: str, before: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] in "LMN" or character in _PUNCTUATION or (kind in ("So", "Sk") and not character.isascii()):
        return "" if kind == "Mn" and character == JOINERS[1] and before.isascii() else character
    if character in JOINERS and before and not before.isascii():
        return character
    if kind == "Zs":
        return " "
    return "" if kind in UNSEEN else "_"
