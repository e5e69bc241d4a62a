"""Foreign text, out of files and metadata, made fit to be shown on one line."""

from __future__ import annotations

import unicodedata

LONGEST = 80  # characters
LONGEST_SENTENCE = 1000
UNSEEN = frozenset(
    {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
)  # control and direction characters, and no characters


def plain(text: object, longest: int = LONGEST) -> str:
    """Without control and direction characters, at most `longest`: neither a page nor a terminal obeys it."""
    return _cut(" ".join(_seen(str(text)[: 8 * longest]).split()), longest)


def sentence(text: str) -> str:
    """The same for one of our own that quotes foreign text: every space stays, and so does a paragraph's length."""
    return _cut(text if text.isprintable() else _seen(text[: 2 * LONGEST_SENTENCE]), LONGEST_SENTENCE)


def _seen(text: str) -> str:
    return "".join(c if unicodedata.category(c) not in UNSEEN else " " for c in text)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
