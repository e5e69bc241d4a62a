"""CLIP's 49,408 tokens, from the 48,894 merges that are shipped: a single file has no tokenizer inside.

Order of the ids (https://github.com/openai/CLIP, MIT): 256 bytes, the same 256 at the end of a word, one
token per merge in the order of the merges, then start and end of text.
"""

from __future__ import annotations

import functools
import gzip
from importlib import resources

SIZE = 49_408
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def byte_letters() -> list[str]:
    """One printable character for each byte, in CLIP's order: the printable Latin-1 bytes stand for
    themselves and come first; the others follow, written as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


@functools.cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """The merges, most frequent first."""
    packed = resources.files("lora_core").joinpath("data", "clip_merges.txt.gz").read_bytes()
    pairs = [line.split(" ") for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    return tuple((left, right) for left, right in pairs)


def clip_vocabulary() -> dict[str, int]:
    """Token -> id."""
    letters = byte_letters()
    merged = [left + right for left, right in clip_merges()]
    tokens = [*letters, *(letter + WORD_END for letter in letters), *merged, START, END]
    return {token: i for i, token in enumerate(tokens)}
