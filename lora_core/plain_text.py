"""Foreign text, out of files and metadata, made fit to be shown on one line."""

from __future__ import annotations

import unicodedata

LONGEST = 80  # characters
UNSEEN = frozenset(
    {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
)  # control and direction characters, and no characters


def plain(text: object, longest: int = LONGEST) -> str:
    """Without control and direction characters, at most `longest`: neither a page nor a terminal obeys it."""
    words = "".join(c if unicodedata.category(c) not in UNSEEN else " " for c in str(text)[: 8 * longest])
    words = " ".join(words.split())
    return words if len(words) <= longest else f"{words[: longest - 1]}…"
