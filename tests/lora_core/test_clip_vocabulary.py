"""CLIP's tokenizer from shipped merges: known ids, and against byte-pair encoding written out plainly."""

from __future__ import annotations

import functools
import re
import unicodedata
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from lora_core.base_parts import clip_tokenizer
from lora_core.clip_vocabulary import SIZE, byte_letters, clip_merges, clip_vocabulary

# Written down from OpenCLIP's own tokenizer: open_clip_torch 3.3, SimpleTokenizer.encode.
KNOWN: dict[str, list[int]] = {
    "": [],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "astronaut riding a horse on mars": [18376, 6765, 320, 4558, 525, 7496],
    "masterpiece, best quality, 1girl": [12066, 267, 949, 3027, 267, 272, 1611],
    "it's 7:30 o'clock": [585, 568, 278, 281, 274, 271, 334, 262, 6716],
    "(a:1.2), [b|c]": [263, 320, 281, 272, 269, 273, 2361, 314, 321, 347, 322, 316],
    "supercalifragilisticexpialidocious": [1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466],
    "Ελλάδα": [138, 113, 138, 119, 138, 119, 138, 105, 138, 112, 138, 365],
    "naïve café": [1097, 35689, 563, 15304],
    "日本語の文字": [39121, 44353, 34002, 252, 21575, 29032, 229, 35751, 501],
    "🐱 emoji 👍🏽": [22979, 16327, 43722],
    "sks dog": [48136, 1929],
    "photorealistic 8k hdr": [1153, 16157, 279, 330, 28065],
    "  Two\nlines\t and  SPACES ": [1237, 3418, 537, 9006],
    "<lora:cat:0.8>": [283, 2179, 320, 281, 2368, 281, 271, 269, 279, 285],
    "½ x² ™": [33613, 343, 41175, 11675],
    "don't you'RE I'LL": [847, 713, 592, 982, 328, 1342],
}


@functools.cache
def tokenizer() -> CLIPTokenizer:
    return clip_tokenizer()


def test_known_ids() -> None:
    found = {text: tokenizer()(text).input_ids for text in KNOWN}
    assert found == {text: [49406, *ids, 49407] for text, ids in KNOWN.items()}


def test_the_vocabulary_is_complete() -> None:
    vocabulary = clip_vocabulary()
    assert len(vocabulary) == len(tokenizer()) == SIZE == 49408
    assert sorted(vocabulary.values()) == list(range(SIZE))
    assert len(clip_merges()) == len(set(clip_merges())) == 48894
    assert sorted(byte_letters()) == sorted(set(byte_letters()))
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)
    specials = tokenizer()
    assert (specials.bos_token_id, specials.eos_token_id, specials.pad_token_id) == (49406, 49407, 49407)


def test_long_prompts_end_at_77() -> None:
    ids = tokenizer()("cat " * 200, truncation=True, padding="max_length").input_ids
    assert (len(ids), ids[0], ids[-1]) == (77, 49406, 49407)


@functools.cache
def tables() -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    return {pair: i for i, pair in enumerate(clip_merges())}, clip_vocabulary()


def plain_bpe(word: str) -> list[int]:
    """Sennrich's algorithm, word for word: merge the most frequent pair until none is known."""
    ranks, vocabulary = tables()
    latin = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = dict(zip([*latin, *(b for b in range(256) if b not in latin)], byte_letters(), strict=True))
    pieces = [letters[b] for b in word.encode()]
    pieces[-1] += "</w>"
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, 10**9), i) for i, pair in enumerate(pairwise(pieces)))
        if rank == 10**9:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [vocabulary[piece] for piece in pieces]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(categories=["Ll"], max_codepoint=0x4FF), min_size=1, max_size=12), max_size=5
    )
)
def test_any_words_against_plain_byte_pair_encoding(words: list[str]) -> None:
    words = [unicodedata.normalize("NFC", w).lower() for w in words]
    words = [w for w in words if re.fullmatch(r"[^\W\d_]+", w)]
    expected = [i for word in words for i in plain_bpe(word)]
    assert tokenizer()(" ".join(words)).input_ids == [49406, *expected, 49407]
