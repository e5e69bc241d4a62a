"""The names a UNet's blocks go by: "down", "down.1", "mid", "up.2", with ".attn" or ".res" for only the attentions or
the resnets of it. Anything else is a regular expression, found anywhere in a layer's path inside the UNet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from lora_core.adapter import COMPONENTS
from lora_core.errors import ConfigError

_BLOCK = re.compile(r"(?:(down|up)(?:\.(\d+))?|(mid))(?:\.(attn|res))?")
_INSIDE = {"attn": "attentions.", "res": "resnets."}


def known_blocks(paths: Iterable[str]) -> list[str]:
    """The block names that these layers of a model know: down, down.0, ..., mid, up, up.0, ...

    `paths` are adapter paths (unet.down_blocks.0...), of which the UNet's count, or paths inside a UNet.
    """
    found: set[tuple[str, int]] = set()
    for path in inside_unet(paths):
        block = re.match(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.", path)
        if block:
            found |= {(block[1] or block[3], -1), (block[1] or block[3], int(block[2] or -1))}
    return [side if number < 0 else f"{side}.{number}" for side, number in sorted(found)]


def inside_unet(paths: Iterable[str]) -> list[str]:
    """The paths as they are inside the UNet; those of the text encoders are left out."""
    split = [(path, *path.partition(".")[::2]) for path in paths]
    return [
        inside if first == "unet" else path for path, first, inside in split if first not in COMPONENTS[1:]
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
