"""Mix: which LoRAs are worn, and how strongly, per component and per block. Order-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_core.adapter import COMPONENTS
from lora_core.errors import ConfigError, did_you_mean

_BLOCK = re.compile(r"(?:(down|up)(?:\.(\d+))?|(mid))(?:\.(attn|res))?")
_INSIDE = {"attn": "attentions.", "res": "resnets."}


@dataclass(frozen=True)
class AdapterWeight:
    """One LoRA's weights: per component, and for single UNet blocks in place of the component's.

    Block keys: "down", "down.1", "mid", "up.2", with ".attn" or ".res" for only the attentions or the resnets
    of it; anything else is a regular expression matched anywhere in the path. The longest matching key wins.
    """

    unet: float = 1.0
    text_encoder: float = 1.0
    text_encoder_2: float = 1.0
    blocks: tuple[tuple[str, float], ...] = field(default=())

    @classmethod
    def parse(
        cls, name: str, value: float | Mapping[str, Any], before: AdapterWeight | None = None
    ) -> AdapterWeight:
        """A number for everything, or a dict that changes what it names and leaves the rest as `before`."""
        if isinstance(value, Mapping):
            known = (*COMPONENTS, "blocks")
            for key in value:
                if key not in known:
                    raise ConfigError(f'Weight of "{name}": "{key}" is unknown.{did_you_mean(key, known)}')
            base = before or cls()
            parts = {c: _number(f"{name}.{c}", value.get(c, getattr(base, c))) for c in COMPONENTS}
            if "text_encoder" in value and "text_encoder_2" not in value:
                parts["text_encoder_2"] = parts["text_encoder"]  # one slider for both of SDXL's encoders
            blocks = dict(base.blocks)
            for key, weight in dict(value.get("blocks", {})).items():
                _block_pattern(key)  # a bad expression is refused here, not in the middle of an image
                blocks[key] = _number(f"{name}.blocks.{key}", weight)
            return cls(**parts, blocks=tuple(blocks.items()))
        number = _number(name, value)
        return cls(number, number, number)

    def at(self, path: str) -> float:
        """The weight of the layer with this adapter path."""
        component, _, inside = path.partition(".")
        if component == "unet":
            hits = [(len(key), weight) for key, weight in self.blocks if _block_pattern(key).search(inside)]
            if hits:
                return max(hits, key=lambda hit: hit[0])[1]
        return float(getattr(self, component))

    def scaled(self, factor: float) -> AdapterWeight:
        parts = {c: getattr(self, c) * factor for c in COMPONENTS}
        return AdapterWeight(**parts, blocks=tuple((k, v * factor) for k, v in self.blocks))

    @property
    def plain(self) -> float | dict[str, Any]:
        """As `parse` takes it: one number where it is one."""
        if not self.blocks and self.unet == self.text_encoder == self.text_encoder_2:
            return self.unet
        parts: dict[str, Any] = {c: getattr(self, c) for c in COMPONENTS}
        return {**parts, **({"blocks": dict(self.blocks)} if self.blocks else {})}


Mix = dict[str, AdapterWeight]
WeightValue = float | Mapping[str, Any]


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(
            f"Weight {what} = {value!r} is not a finite number. Usual weights are between -1 and 2."
        )
    return float(value)


def _block_pattern(key: str) -> re.Pattern[str]:
    named = _BLOCK.fullmatch(key)
    if named:
        side, number, mid, inside = named.groups()
        block = "mid_block" if mid else f"{side}_blocks" + rf"\.{number if number else '[0-9]+'}"
        return re.compile(rf"^{block}\.{_INSIDE.get(inside, '')}")
    try:
        return re.compile(key)
    except re.error as problem:
        raise ConfigError(
            f'Block "{key}" is neither a block name nor a regular expression: {problem}.'
        ) from problem
