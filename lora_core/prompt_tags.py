"""LoRAs named inside a prompt, in the way of A1111's web UI (its `extra networks`):

    <lora:ink>                  1 everywhere
    <lora:ink:0.8>              0.8 everywhere
    <lora:ink:0.5:0.8>          text encoders 0.5, UNet 0.8: that way round
    <lora:ink:unet=0.8:te=0.5>  the same, in any order
    <lyco:ink:0.8>              an older extension's word for <lora:ink:0.8>

What is not said follows A1111, so that a prompt from there looks the same here: the text encoders have 1, and the
UNet what the text encoders have. So <lora:ink:te=0.5> is 0.5 in both, and a name wins over a place.
"""

from __future__ import annotations

import math
import re

from lora_core.errors import ConfigError, did_you_mean
from lora_core.mix import WeightValue

TAG = re.compile(r"<(lora|lyco|hypernet):([^<>\n]*)>", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_HOW = "Write it as <lora:NAME:0.8>, or as <lora:NAME:te=0.5:unet=0.8> for text encoders and UNet."
_GAP = " \t"


def split_tags(prompt: str) -> tuple[str, dict[str, WeightValue]]:
    """-> the prompt without its tags, and the weight of each LoRA as `AdapterWeight.parse` takes it.

    Where a tag was, no double space stays and no space before a comma; a tag that was an item between commas
    takes one of them with it. Text without tags comes back as it was. Raises ConfigError for a tag that is not
    understood, and for a LoRA named twice.
    """
    weights: dict[str, WeightValue] = {}
    plain, end = "", 0
    for found in TAG.finditer(prompt):
        name, weight = read_tag(found)
        if name in weights:
            raise ConfigError(
                f'The prompt names the LoRA "{name}" twice, last in {found[0]}. Keep one of them.'
            )
        weights[name] = weight
        text = prompt[end : found.start()]
        plain = _joined(plain, text) if end else text
        end = found.end()
    if not end:
        return prompt, weights
    rest = prompt[end:]
    if not rest.strip():  # the prompt ended with a tag
        return plain.rstrip().removesuffix(","), weights
    return _joined(plain, rest), weights


def read_tag(found: re.Match[str]) -> tuple[str, WeightValue]:
    """A match of TAG -> the LoRA's name, and one number or {"unet", "text_encoder"}. Raises ConfigError."""
    tag, kind = found[0], found[1].lower()
    name, *arguments = (part.strip() for part in found[2].split(":"))
    if kind == "hypernet":
        raise ConfigError(
            f"{tag} is a hypernetwork, and only LoRAs are worn here. Take it out of the prompt."
        )
    if not name:
        raise ConfigError(f"{tag} names no LoRA. {_HOW}")
    placed: list[float] = []
    named: dict[str, float] = {}
    for argument in arguments:
        key, equals, value = (part.strip() for part in argument.rpartition("="))
        key = key.lower()
        if key == "dyn" or (not equals and len(placed) == 2):
            raise ConfigError(
                f'{tag}: "{argument}" asks for a part of the LoRA\'s rank (dyn), which is not done here. Take it out: '
                "the LoRA is then worn whole."
            )
        if not equals:
            placed.append(_number(tag, value))
        elif key not in ("te", "unet"):
            raise ConfigError(f'{tag}: "{key}" is unknown.{did_you_mean(key, ("te", "unet"))} {_HOW}')
        elif key in named:
            raise ConfigError(f"{tag} says {key} twice. Keep one of them.")
        else:
            named[key] = _number(tag, value)
    text_encoder = named.get("te", placed[0] if placed else 1.0)
    unet = named.get("unet", placed[1] if len(placed) == 2 else text_encoder)
    return name, unet if unet == text_encoder else {"unet": unet, "text_encoder": text_encoder}


def _number(tag: str, text: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(number):
        raise ConfigError(f'{tag}: "{text}" is not a finite number. {_HOW}')
    return number


def _joined(before: str, after: str) -> str:
    """The text on both sides of a tag, as if the tag had never been written."""
    left, right = before.rstrip(_GAP), after.lstrip(_GAP)
    starts = not left or left.endswith("\n")
    if right.startswith(",") and (starts or left.endswith(",")):
        right = right[1:].lstrip(_GAP)
    elif left + right == before + after:
        return before + after  # the tag stood inside a word
    if starts or right.startswith((",", ".", ";", ")", "]", "\n")) or left.endswith(("(", "[")):
        return left + right
    return f"{left} {right}"  # also before nothing: what follows the next tag decides
