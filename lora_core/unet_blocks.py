"""The names a UNet's blocks go by: "down", "down.1", "mid", "up.2", with ".attn" or ".res" for only the attentions or
the resnets of it, and ".attn.0" for the first of them. Anything else is a regular expression, found anywhere in a
layer's path inside the UNet. A picture or a mix from elsewhere may bring one along, so only such as are looked for in a
moment are taken.

Where blocks are trained with ranks and rates of their own, a text encoder has some too: "layers.3". There only names
count, and of several that hold for a layer the longest decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from re import _parser  # type: ignore[attr-defined]  # the one thing that tells what an expression is made of
from typing import Any

from lora_core.errors import ConfigError

_BLOCK = re.compile(r"(?:(down|up)(?:\.(\d+))?|(mid))(?:\.(attn|res)(?:\.(\d+))?)?")
_LAYER = re.compile(r"layers\.(\d+)")
_PLACE = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.")
_INSIDE = {"attn": "attentions.", "res": "resnets."}
_LENGTH, _DIGITS = 64, 4  # of a path, and of a number in one
_DIGIT = [str(_parser.parse(digit)) for digit in (r"\d", "[0-9]")]
_WAYS = 2.0**21  # the slowest expression found below it took 0.13 s for a path of 62 letters


def known_blocks(paths: Iterable[str]) -> list[str]:
    """The block names that these layers of a model know: down, down.0, ..., mid, up, up.0, ...

    `paths` are adapter paths (unet.down_blocks.0...), of which the UNet's count, or paths inside a UNet.
    """
    found: set[tuple[str, int]] = set()
    for path in inside_unet(paths):
        block = _PLACE.match(path)
        if block:
            found |= {(block[1] or block[3], -1), (block[1] or block[3], int(block[2] or -1))}
    return [side if number < 0 else f"{side}.{number}" for side, number in sorted(found)]


def block_of(inside: str) -> str:
    """The block that the layer with this path inside the UNet lies in: down.1, mid; "" for one outside of them."""
    place = _PLACE.match(inside)
    return "" if place is None else place[3] or f"{place[1]}.{place[2]}"


def inside_unet(paths: Iterable[str]) -> list[str]:
    """The paths as they are inside the UNet; those of the text encoders are left out."""
    split = [(path, *path.partition(".")[::2]) for path in paths]
    return [
        inside if first == "unet" else path
        for path, first, inside in split
        if not first.startswith("text_encoder")
    ]


@lru_cache(maxsize=2**16)  # the layers of an SDXL times forty keys; a slider asks for all of them every time
def matches(key: str, inside: str) -> bool:
    """Whether a block key holds for the layer with this path inside the UNet."""
    return block_pattern(key).search(inside) is not None


@lru_cache(maxsize=1024)
def block_pattern(key: str) -> re.Pattern[str]:
    """Raises ConfigError for what is no block's name and no regular expression, or for one that could take hours."""
    named = _BLOCK.fullmatch(key)
    if named:
        side, number, mid, inside, which = named.groups()
        block = "mid_block" if mid else f"{side}_blocks" + rf"\.{number if number else '[0-9]+'}"
        return re.compile(rf"^{block}\.{_INSIDE.get(inside, '')}" + (rf"{which}\." if which else ""))
    try:
        pattern, slow = re.compile(key), _ways(_parser.parse(key), float(_LENGTH)) > _WAYS
    except (re.error, RecursionError, OverflowError) as problem:
        raise ConfigError(
            f'Block "{key}" is neither a block name nor a regular expression: {problem}.'
        ) from problem
    if slow:
        raise ConfigError(
            f'Block "{key[:80]}" is a regular expression that can take very long: it leaves too many ways to find '
            "it. Use * and + once or twice, and not behind a bracket; or name the blocks, such as down.1.attn."
        )
    return pattern


def _ways(items: Iterable[tuple[Any, Any]], before: float = 1.0) -> float:
    """In how many ways at most this can be laid onto a path, whose letters may fit everywhere: what is tried before it
    is given up. `before`: at how many places it may begin."""
    tried, ways = 0.0, before
    for kind, value in items:
        if _begins(kind, value):  # whatever stands before can only be nothing
            tried, ways = tried + ways, 1.0
        if str(kind) in ("ASSERT", "ASSERT_NOT"):  # which is not gone back into
            tried += ways * _ways(value[-1])
        else:
            ways = min(ways * _ways_of(str(kind), value), _WAYS * 2)
    return tried + ways


def _ways_of(kind: str, value: Any) -> float:
    """Of one part, as Python's own parser has it."""
    if kind == "BRANCH":
        return sum(_ways(part) for part in value[1])
    if kind in ("SUBPATTERN", "ATOMIC_GROUP"):
        return _ways(value if kind == "ATOMIC_GROUP" else value[-1])
    if kind == "GROUPREF_EXISTS":
        return sum(_ways(part) for part in value[1:] if part is not None)
    if kind not in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return 1.0
    least, inner, ways = int(value[0]), value[2], _ways(value[2])
    most = min(int(value[1]), _DIGITS if str(inner) in _DIGIT else _LENGTH)
    if ways == 1:  # it may end after any of them
        return max(1.0, most - least + 1.0)
    return math.exp2(min(most * math.log2(ways), 99))


def _begins(kind: Any, value: Any) -> bool:
    if str(kind) in ("SUBPATTERN", "ASSERT"):
        return len(value[-1]) > 0 and _begins(*value[-1][0])
    return str(kind) == "AT" and str(value) in ("AT_BEGINNING", "AT_BEGINNING_STRING")


def overlap(one: str, other: str) -> str | None:
    """The block that two block names share: down.1, down.attn -> down.1.attn. None where nothing is, or unknown."""
    first, second = _BLOCK.fullmatch(one), _BLOCK.fullmatch(other)
    if first is None or second is None:
        return None
    shared = []  # down or up, mid, number, attn or res, which of them
    for x, y in zip(first.group(1, 3, 2, 4, 5), second.group(1, 3, 2, 4, 5), strict=True):
        if x and y and x != y:
            return None
        shared.append(x or y)
    return None if shared[0] and shared[1] else ".".join(filter(None, shared))  # up and mid: nothing


@lru_cache(maxsize=1024)
def named_block(key: str) -> re.Pattern[str]:
    """Where the layers of a UNet's block, or of a text encoder's layer, begin. ConfigError for what is no such name."""
    if _BLOCK.fullmatch(key):
        return block_pattern(key)
    if layer := _LAYER.fullmatch(key):
        return re.compile(rf"^(?:text_model\.)?encoder\.layers\.{layer[1]}\.")
    raise ConfigError(
        f'"{key}" is no block: write down, down.1, mid, up.2 or up.2.attn of a UNet, layers.3 of a text encoder.'
    )


def check_named(keys: Collection[str]) -> None:
    """Raise ConfigError unless every key is a block's name and no two cross without one that says what holds there."""
    for key in keys:
        named_block(key)
    for one in keys:
        for other in keys:
            shared = overlap(one, other)
            if shared is not None and shared not in keys:
                raise ConfigError(
                    f'Blocks "{one}" and "{other}" both hold for "{shared}": give that one too.'
                )


def deciding(keys: Iterable[str], inside: str) -> str | None:
    """Of the named blocks that hold for the layer with this path inside its component, the longest."""
    return max((k for k in keys if named_block(k).search(inside)), key=lambda k: k.count("."), default=None)
