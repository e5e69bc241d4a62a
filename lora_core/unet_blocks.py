"""The names a UNet's blocks go by: "down", "down.1", "mid", "up.2", with ".attn" or ".res" for only the attentions or
the resnets of it. Anything else is a regular expression, found anywhere in a layer's path inside the UNet.

Where blocks are trained with ranks and rates of their own, a text encoder has some too: "layers.3". There only names
count, and of several that hold for a layer the longest decides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache

from lora_core.errors import ConfigError

_BLOCK = re.compile(r"(?:(down|up)(?:\.(\d+))?|(mid))(?:\.(attn|res))?")
_LAYER = re.compile(r"layers\.(\d+)")
_PLACE = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.")
_INSIDE = {"attn": "attentions.", "res": "resnets."}


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
    """Raises ConfigError for what is neither a block's name nor a regular expression."""
    named = _BLOCK.fullmatch(key)
    if named:
        side, number, mid, inside = named.groups()
        block = "mid_block" if mid else f"{side}_blocks" + rf"\.{number if number else '[0-9]+'}"
        return re.compile(rf"^{block}\.{_INSIDE.get(inside, '')}")
    try:
        return re.compile(key)
    except (re.error, RecursionError, OverflowError) as problem:
        raise ConfigError(
            f'Block "{key}" is neither a block name nor a regular expression: {problem}.'
        ) from problem


def overlap(one: str, other: str) -> str | None:
    """The block that two block names share: down.1, down.attn -> down.1.attn. None where nothing is, or unknown."""
    first, second = _BLOCK.fullmatch(one), _BLOCK.fullmatch(other)
    if first is None or second is None:
        return None
    shared = []  # down or up, mid, number, attn or res
    for x, y in zip(first.group(1, 3, 2, 4), second.group(1, 3, 2, 4), strict=True):
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
