"""LoraConfig: what a LoRA to be trained looks like. One frozen value, checked at birth."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lora_core.errors import ConfigError, did_you_mean

INITS = ("gaussian", "kaiming", "random")
VARIANTS = ("lora", "dora")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The shape of a LoRA and where it goes.

    rank, alpha        ΔW = alpha/rank · B A; alpha None means alpha = rank
    dropout            on the layer's input, in training only
    targets            a group ("attention", "feed-forward", "projection", "conv", "all-linear",
                       "all-linear+conv"), a tuple of groups and path suffixes, or one regular expression
                       matched against the whole module path
    exclude            path suffixes or one regular expression never to touch
    init               "gaussian" (A ~ N(0, 1/r), B = 0), "kaiming" (PEFT's default), "random" (not the identity)
    variant            "lora" or "dora" (arXiv 2402.09353, output axis)
    rank_stabilized    alpha/sqrt(rank) instead of alpha/rank (arXiv 2312.03732)
    rank_pattern, alpha_pattern   path suffix or regular expression -> value, as PEFT
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "attention"
    exclude: str | tuple[str, ...] = ()
    init: str = "gaussian"
    variant: str = "lora"
    rank_stabilized: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (("init", self.init, INITS), ("variant", self.variant, VARIANTS)):
            if value not in known:
                raise ConfigError(f'{name} = "{value}" is unknown.{did_you_mean(value, known)}')
        for rank in (self.rank, *self.rank_pattern.values()):
            if not 1 <= rank <= 4096:
                raise ConfigError(f"rank = {rank} is out of range: use 1 to 4096 (4 to 64 are usual).")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not 0 < alpha < float("inf"):
                raise ConfigError(
                    f"alpha = {alpha} must be a positive number; leave it out for alpha = rank."
                )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout = {self.dropout} must be at least 0 and below 1.")
        for pattern in (self.targets, self.exclude):
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as problem:
                    raise ConfigError(f'"{pattern}" is no regular expression: {problem}.') from problem

    def rank_at(self, path: str) -> int:
        return int(_by_pattern(self.rank_pattern, path, self.rank))

    def alpha_at(self, path: str) -> float:
        default = self.rank_at(path) if self.alpha is None else self.alpha
        return float(_by_pattern(self.alpha_pattern, path, default))


def _by_pattern(patterns: dict[str, int] | dict[str, float], path: str, default: float) -> float:
    """First pattern that matches the end of the path, at a dot (PEFT's rule)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
