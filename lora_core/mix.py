"""Mix: which LoRAs are worn, and how strongly: per component, per block, along the denoising. Order-free.

{"ink": 0.8,
 "cat": {"unet": 0.7, "text_encoder": 0.5, "blocks": {"down.1": 0.3, "mid.attn": 0},
         "curve": [[0, 1], [0.6, 1], [1, 0]], "half": "conditional"}}
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal

from lora_core.adapter import COMPONENTS
from lora_core.errors import ConfigError, NotLoaded, did_you_mean
from lora_core.unet_blocks import block_pattern, inside_unet, known_blocks, matches, overlap

__all__ = [
    "AdapterWeight",
    "Curve",
    "Mix",
    "WeightValue",
    "check_blocks",
    "crossfade",
    "known_blocks",
    "muted",
    "solo",
    "split_weight",
]

_HALVES = ("both", "conditional")
_KNOWN = (*COMPONENTS, "blocks", "curve", "half")
BLOCKS = 1024  # of one LoRA; as many expressions are kept compiled

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class AdapterWeight:
    """One LoRA's weights: per component, and for single UNet blocks in place of the component's.

    blocks  keys: "down", "down.1", "mid", "up.2", with ".attn" or ".res" for only the attentions or the resnets
            of it; anything else is a regular expression matched anywhere in the path, of which those that could be slow
            are refused. The longest matching key wins.
    curve   (progress, factor) points, progress increasing within 0..1: 0 is the first step's call of the UNet, 1 the
            last one's. Straight lines between the points, constant outside them, none at all is 1. Multiplies
            every weight in the UNet, blocks included; text encoders run before the denoising and never see it.
    half    "conditional": in the UNet it acts on the prompt's half of classifier-free guidance only
    """

    unet: float = 1.0
    text_encoder: float = 1.0
    text_encoder_2: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()
    curve: Curve = ()
    half: Literal["both", "conditional"] = "both"

    @classmethod
    def parse(
        cls,
        name: str,
        value: float | Mapping[str, Any] | AdapterWeight,
        before: AdapterWeight | None = None,
    ) -> AdapterWeight:
        """A number for everything, a dict that changes what it names and leaves the rest as `before`, or a whole one.

        A number drops blocks, curve and half. Raises ConfigError naming the LoRA and the setting.
        """
        if isinstance(value, AdapterWeight):
            return value
        if not isinstance(value, Mapping):
            number = _number(name, value)
            return cls(number, number, number)
        for key in value:
            if key not in _KNOWN:
                raise ConfigError(f'Weight of "{name}": "{key}" is unknown.{did_you_mean(str(key), _KNOWN)}')
        base = before or cls()
        parts = {c: _number(f"{name}.{c}", value.get(c, getattr(base, c))) for c in COMPONENTS}
        if "text_encoder" in value and "text_encoder_2" not in value:
            parts["text_encoder_2"] = parts["text_encoder"]  # one slider for both of SDXL's encoders
        blocks = dict(base.blocks) | _blocks(name, value.get("blocks", {}))
        curve = _curve(name, value["curve"]) if "curve" in value else base.curve
        half = value.get("half", base.half)
        if half not in _HALVES:
            hint = did_you_mean(str(half), _HALVES)
            raise ConfigError(f"Weight {name}.half = {half!r} is unknown.{hint}")
        return cls(**parts, blocks=tuple(blocks.items()), curve=curve, half=half)

    def at(self, path: str, *, progress: float = 0.0) -> float:
        """The weight of the layer with this adapter path, `progress` (0..1) of the way through the denoising."""
        component, _, inside = path.partition(".")
        if component != "unet":
            return float(getattr(self, component))
        weight, longest = self.unet, -1
        for key, own in self.blocks:
            if len(key) > longest and matches(key, inside):
                weight, longest = own, len(key)
        return float(weight) * self.factor(progress)

    def factor(self, progress: float) -> float:
        """What the curve multiplies the UNet's weights by."""
        if not self.curve:
            return 1.0
        after = bisect_right(self.curve, progress, key=lambda point: point[0])
        if after in (0, len(self.curve)):
            return self.curve[max(after - 1, 0)][1]
        (x0, y0), (x1, y1) = self.curve[after - 1], self.curve[after]
        return y0 + (y1 - y0) * ((progress - x0) / (x1 - x0))

    @property
    def moving(self) -> bool:
        """Whether the weight in the UNet depends on the progress."""
        return len({factor for _, factor in self.curve}) > 1

    def scaled(self, factor: float) -> AdapterWeight:
        """Every weight times `factor`; curve and half stay."""
        # + 0.0 makes 0 of -0: a negative weight turned off is not shown as "-0.0"
        parts = {c: getattr(self, c) * factor + 0.0 for c in COMPONENTS}
        return replace(self, **parts, blocks=tuple((k, v * factor + 0.0) for k, v in self.blocks))

    @property
    def plain(self) -> float | dict[str, Any]:
        """As `parse` takes it, of what JSON and TOML can hold: one number where nothing else is set."""
        more: dict[str, Any] = {
            **({"blocks": dict(self.blocks)} if self.blocks else {}),
            **({"curve": [list(point) for point in self.curve]} if self.curve else {}),
            **({"half": self.half} if self.half != "both" else {}),
        }
        if not more and self.unet == self.text_encoder == self.text_encoder_2:
            return self.unet
        return {**{c: getattr(self, c) for c in COMPONENTS}, **more}


Mix = dict[str, AdapterWeight]
WeightValue = float | Mapping[str, Any] | AdapterWeight


# --- several LoRAs at once ---------------------------------------------------------------------------------


def crossfade(a: Mix, b: Mix, t: float) -> Mix:
    """(1-t)·a + t·b for every LoRA, component and block: at t = 0 exactly a, at t = 1 exactly b.

    A LoRA in only one of them counts as 0 in the other, and is in the result at both ends, so that a model that
    wears the whole result wears what is meant. At named blocks the other side counts with what it has for them;
    a regular expression of one side alone meets the other's component weight. Curves that differ are mixed as
    factors, so halfway the weight is a product of two mixtures. A side that is 0 throughout the UNet has no say
    in curve and half. Raises ConfigError for t outside 0..1 and for halves that differ.
    """
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= 1:
        raise ConfigError(f"The crossfade stands at {t!r}: it goes from 0, the first mix, to 1, the second.")
    faded: Mix = {}
    for name in dict.fromkeys((*a, *b)):
        left, right = a.get(name), b.get(name)
        if left is None:
            left = b[name].scaled(0.0)
        faded[name] = _between(name, left, left.scaled(0.0) if right is None else right, t)
    return faded


def muted(mix: Mix, names: Iterable[str]) -> Mix:
    """A new Mix with these LoRAs at 0 and the others as they are. `mix` itself is the memory of what they had:
    it is not changed, and what is heard again is taken from it. Raises NotLoaded for a name that is not in it."""
    silent = _named(mix, names)
    return {name: weight.scaled(0.0) if name in silent else weight for name, weight in mix.items()}


def solo(mix: Mix, names: Iterable[str]) -> Mix:
    """A new Mix in which only these LoRAs sound: `muted` for all the others, so no name at all is silence."""
    return muted(mix, set(mix) - _named(mix, names))


def split_weight(text: str) -> tuple[str, float]:
    """ "file.safetensors:0.8" -> file, weight. A colon without a number after it belongs to the path (C:\\...)."""
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def _named(mix: Mix, names: Iterable[str]) -> set[str]:
    wanted = {names} if isinstance(names, str) else set(names)  # "cat" is a LoRA, not c, a and t
    for name in sorted(wanted - set(mix)):
        hint = did_you_mean(name, mix) if mix else " There is none in it."
        raise NotLoaded(f'No LoRA named "{name}" is in the mix.{hint}')
    return wanted


def _between(name: str, a: AdapterWeight, b: AdapterWeight, t: float) -> AdapterWeight:
    silent = [not w.unet and not any(value for _, value in w.blocks) for w in (a, b)]
    curve, half = _curve_between(a, b, t), a.half
    if any(silent):
        heard = b if silent[0] else a
        curve, half = heard.curve, heard.half
    elif a.half != b.half:
        raise ConfigError(
            f'"{name}" acts on the prompt alone (half "conditional") in one mix and on both halves in the other, and '
            "there is nothing between them. Give it the same half in both."
        )
    if t in (0, 1):
        return b if t else a
    return AdapterWeight(
        **{c: _lerp(getattr(a, c), getattr(b, c), t) for c in COMPONENTS},
        blocks=_blocks_between(a, b, t),
        curve=curve,
        half=half,
    )


def _lerp(a: float, b: float, t: float) -> float:
    return a if a == b else (1 - t) * a + t * b  # what is equal on both sides does not move by a rounding


def _curve_between(a: AdapterWeight, b: AdapterWeight, t: float) -> Curve:
    if a.curve == b.curve:
        return a.curve
    points = sorted({progress for progress, _ in (*a.curve, *b.curve)})
    return tuple((progress, _lerp(a.factor(progress), b.factor(progress), t)) for progress in points)


def _blocks_between(a: AdapterWeight, b: AdapterWeight, t: float) -> tuple[tuple[str, float], ...]:
    keys = dict.fromkeys(key for key, _ in (*a.blocks, *b.blocks))
    # where "down.1" of one side overlaps "down.attn" of the other, neither key alone says what holds there
    keys |= dict.fromkeys(filter(None, (overlap(k, other) for k, _ in a.blocks for other, _ in b.blocks)))
    return tuple((key, _lerp(_within(a, key), _within(b, key), t)) for key in keys)


def _within(weight: AdapterWeight, key: str) -> float:
    """What a weight has for the whole of a block."""
    own = dict(weight.blocks)
    around = [k for k in own if k == key or overlap(k, key) == key]
    return own[max(around, key=len)] if around else weight.unet


# --- the blocks of a model ---------------------------------------------------------------------------------


def check_blocks(name: str, weight: AdapterWeight, paths: Iterable[str]) -> None:
    """Raise ConfigError for a block of `weight` that names no UNet layer of the model with these `paths`."""
    if not weight.blocks:
        return
    layers = inside_unet(paths)
    for key, _ in weight.blocks:
        if not any(matches(key, path) for path in layers):
            known = known_blocks(layers)
            parts = [*known, *(f"{block}.{part}" for block in known for part in ("attn", "res"))]
            near = get_close_matches(key, [p for p in parts if any(matches(p, path) for path in layers)], n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise ConfigError(
                f'Weight of "{name}": block "{key}" names no layer of this model\'s UNet.{hint} Known: '
                f"{', '.join(known)}; each with .attn or .res for only its attentions or resnets; "
                "or a regular expression that is found in a layer's path."
            )


# --- what a dict may say -----------------------------------------------------------------------------------


def _number(what: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond every float
        pass
    raise ConfigError(
        f"Weight {what} = {value!r} is not a finite number. Usual weights are between -1 and 2."
    )


def _blocks(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f'Weight {name}.blocks = {value!r} is no table. Write it as {{"down.1": 0.5}}.')
    if len(value) > BLOCKS:
        raise ConfigError(f"Weight {name}.blocks names {len(value)} blocks. Name at most {BLOCKS}.")
    for key in value:
        block_pattern(key)  # a bad expression is refused here, not in the middle of an image
    return {key: _number(f"{name}.blocks.{key}", weight) for key, weight in value.items()}


def _curve(name: str, value: Any) -> Curve:
    if not isinstance(value, list | tuple) or not all(
        isinstance(p, list | tuple) and len(p) == 2 for p in value
    ):
        raise ConfigError(
            f"Weight {name}.curve = {value!r} is no list of [progress, factor] points. Write it as "
            "[[0, 1], [0.6, 1], [1, 0]]: full until 0.6 of the way, then fading out."
        )
    curve = tuple((_number(f"{name}.curve", x), _number(f"{name}.curve", y)) for x, y in value)
    progress = [x for x, _ in curve]
    if any(not 0 <= x <= 1 for x in progress):
        raise ConfigError(f"Weight {name}.curve has progress {progress}: 0 is the first step, 1 is the last.")
    if any(x >= after for x, after in pairwise(progress)):
        raise ConfigError(
            f"Weight {name}.curve has progress {progress}: it must increase. For a jump, put two points close "
            "together."
        )
    return curve
