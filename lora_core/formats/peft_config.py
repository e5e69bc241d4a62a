"""PEFT's LoraConfig as JSON: where a PEFT folder and a diffusers file keep their alphas.

    {"r": 8, "lora_alpha": 4, "alpha_pattern": {"mid_block.attentions.0.proj_in": 2}, "use_rslora": false}

A pattern's key is, for PEFT, a regular expression for the end of a module path, anchored at a dot. Such an
expression out of a file could be made to run for hours: only plain paths are taken, and looked up, not run.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lora_core.deltas import Delta
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, FileRefused
from lora_core.formats.writing import ranks_and_alphas

PEFT_DEFAULT_ALPHA = 8.0
_PLAIN = re.compile(r"(\^?)((?:[\w\-]|\\?\.)++)\$?")


def parse(text: str, where: str) -> dict[str, Any]:
    """JSON -> dict. Raises FileRefused; `where` begins the sentence."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise FileRefused(f"{where} is damaged JSON ({problem}). Download or copy it again.") from problem
    if not isinstance(config, dict):
        raise FileRefused(f"{where} should be a JSON object. Download or copy it again.")
    return config


class ByPattern:
    """A number that a layer has by PEFT's rules: its pattern's, or the default."""

    def __init__(self, default: object, patterns: object, name: str, where: str) -> None:
        """Raises FileRefused for values that make no sense."""
        self._default = number(default, name, where)
        self._ends: dict[str, tuple[int, float]] = {}  # end of a path -> (place in the order, number)
        self._wholes: dict[str, tuple[int, float]] = {}
        if not isinstance(patterns or {}, dict):
            raise FileRefused(f"{where}: {name}_pattern should be an object. Download or copy it again.")
        for place, (pattern, value) in enumerate(patterns.items() if isinstance(patterns, dict) else ()):
            path, from_root = _plain(pattern, f"{name}_pattern", where)
            known = self._wholes if from_root else self._ends
            known.setdefault(path, (place, number(value, pattern[:80], where)))

    @classmethod
    def alphas(cls, config: Mapping[str, Any], where: str) -> ByPattern:
        """LoRA's config has `lora_alpha`, others' `alpha`."""
        default = config.get("lora_alpha", config.get("alpha", PEFT_DEFAULT_ALPHA))
        return cls(default, config.get("alpha_pattern"), "alpha", where)

    def of(self, path: str) -> float:
        """`path` inside its model, without `text_model.`. PEFT takes the first pattern that matches."""
        names = path.split(".")
        found = [self._ends.get(".".join(names[i:])) for i in range(len(names))] + [self._wholes.get(path)]
        return min((hit for hit in found if hit is not None), default=(0, self._default))[1]


class Alphas:
    """alpha of a layer by PEFT's rules. rsLoRA is folded in as alpha * sqrt(r): alpha / r is the scale."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """`config` needs no other keys than it has; raises FileRefused for values that make no sense."""
        self._alphas = ByPattern.alphas(config, where)
        self._rank_stabilized = config.get("use_rslora") is True

    def of(self, path: str, rank: int) -> float:
        """`path` inside its model, without `text_model.`."""
        alpha = self._alphas.of(path)
        return alpha * rank**0.5 if self._rank_stabilized else alpha


def plain_paths(names: object, name: str, where: str) -> list[str]:
    """Ends of module paths, without `text_model.`, of what may be one or a list."""
    found = [names] if isinstance(names, str) else names
    if not isinstance(found, list):
        raise FileRefused(f"{where}: {name} should be a list of modules. Download or copy it again.")
    return [_plain(path, name, where)[0] for path in found]


def _plain(pattern: object, name: str, where: str) -> tuple[str, bool]:
    """-> the path, and whether it is one from the root."""
    plain = _PLAIN.fullmatch(pattern) if isinstance(pattern, str) else None
    if plain is None:
        raise FileRefused(
            f"{where}: {name} has {pattern!r:.80}, a regular expression where a module path was expected. Save it "
            "again with plain paths."
        )
    return plain[2].replace("\\", "").removeprefix("text_model."), bool(plain[1])


def in_config(inside: str) -> str:
    """A layer as PEFT's patterns name it: they match the end of a path, so without `text_model.` they match
    the modules of transformers 4 and 5 alike."""
    return inside.removeprefix("text_model.")


def config_of(deltas: Mapping[str, Delta], spelling: str) -> dict[str, Any]:
    """The LoraConfig of one component. `deltas` by path inside the model.

    Everything that differs from the commonest rank and alpha is named layer by layer: nothing is folded into
    the weights. Raises ConfigError where DoRA and plain layers are mixed: PEFT has one switch for all.
    """
    doras = [isinstance(delta, WithMagnitude) for delta in deltas.values()]
    if any(doras) and not all(doras):
        raise ConfigError(
            f"{sum(doras)} of {len(doras)} layers are DoRA, the others plain LoRA; the {spelling} spelling "
            "can only say all or none. Write it in the kohya spelling."
        )
    ranks, alphas = ranks_and_alphas(deltas)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": int(rank),
        "lora_alpha": _short(alpha),
        "rank_pattern": {p: r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {p: _short(a) for p, a in alphas.items() if a != alpha},
        "target_modules": sorted(deltas),
        "use_dora": any(doras),
        "use_rslora": False,
        "bias": "none",
        "lora_bias": False,
        "lora_dropout": 0.0,
    }


def _short(alpha: float) -> float | int:
    """8 and not 8.0, as PEFT's own files have it."""
    return int(alpha) if alpha == int(alpha) else alpha


def number(value: object, name: str, where: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FileRefused(f"{where}: {name} is {value!r:.40} where a number was expected. Download it again.")
    return number
