"""LoraConfig: what a LoRA to be trained looks like. One frozen value, checked at birth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lora_core.errors import ConfigError, did_you_mean
from lora_core.init_names import FROM_BASE, is_from_base
from lora_core.unet_blocks import check_named, deciding

_Value = TypeVar("_Value", int, float)

KINDS = ("lora", "loha", "lokr")
VARIANTS = ("lora", "dora")
INITS = ("gaussian", "kaiming", "random", *FROM_BASE)
# PEFT's, made from what goes through a language model while it is trained or read
FOREIGN_INITS = ("eva", "corda", "lora_ga", "orthogonal", "mica")
BIASES = ("none", "all", "lora_only")
# LoHa and LoKr have one beginning of their own, which the default stands for
_OWN_INITS = ("gaussian", "random")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The shape of a LoRA and where it goes.

    rank, alpha        ΔW = alpha/rank · B A; alpha None means alpha = rank
    dropout            on the layer's input, in training only
    kind               how ΔW is made: "lora", "loha" (arXiv 2108.06098), "lokr" (arXiv 2309.14859)
    variant            "lora": ΔW as it is; "dora": a magnitude per output around it, whatever the kind
                       (arXiv 2402.09353)
    factor             LoKr alone: the first, small factor has about this many rows and columns; -1: as near to the
                       square root of the layer's as its divisors allow
    decompose_both     LoKr alone: split the small factor into two of `rank` as well
    targets            a group ("attention", "feed-forward", "projection", "conv", "all-linear",
                       "all-linear+conv"), a tuple of groups and path suffixes, or one regular expression
                       matched against the whole module path
    exclude            path suffixes or one regular expression never to touch
    layers_to_transform   the index or indices of the layers to take, of those that targets names; what stands in no
                       numbered list is then left out, but for a module named by its whole path (as PEFT)
    layers_pattern     the name (or names, may be regular expressions) of the list that the index counts in, such as
                       "transformer_blocks"; left out: the first numbered list in the path below the model's own
    modules_to_save    path suffixes of whole modules to train as they are, in place of a LoRA; a module with others
                       inside means all of them
    bias               which biases are trained as well: "none", "lora_only" (of the layers with a LoRA), "all"
    init               "gaussian" (A ~ N(0, 1/r), B = 0), "kaiming" (PEFT's default), "random" (not the identity); with
                       LoHa and LoKr the default is LyCORIS' beginning. An embedding begins with A = 0, B ~ N(0, 1)
                       taken from the base's weights, files are of twice the rank and for the ORIGINAL base:
                       "pissa", "pissa_niter_k" (k as 4 or 16: the faster SVD), "olora", "loftq" (a quantised base)
    loftq_iterations   turns of quantising and SVD of "loftq"
    rank_stabilized    alpha/sqrt(rank) instead of alpha/rank (arXiv 2312.03732)
    layer_replication  ranges (start, end) of a list of layers whose stack is trained in its place, weights shared, each
                       place with a LoRA of its own: ((0, 4), (2, 5)) makes 0 1 2 3 2 3 4 (PEFT); in a model with
                       several lists (a UNet) {"mid_block.attentions.0.transformer_blocks": ((0, 1), (0, 1))}.
                       Paths then count in the stack (replication.py)
    rank_pattern, alpha_pattern   path suffix or regular expression -> value, as PEFT
    block_ranks, block_alphas     the same by block ("down.1", "mid", "up.2.attn"; of a text encoder "layers.3"): the
                       longest name that holds decides, a pattern before any; a rank of 0 leaves the block out
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    kind: str = "lora"
    variant: str = "lora"
    factor: int = -1
    decompose_both: bool = False
    targets: str | tuple[str, ...] = "attention"
    exclude: str | tuple[str, ...] = ()
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] = ()
    modules_to_save: str | tuple[str, ...] = ()
    bias: str = "none"
    init: str = "gaussian"
    loftq_iterations: int = 1
    rank_stabilized: bool = False
    layer_replication: Mapping[str, tuple[tuple[int, int], ...]] | tuple[tuple[int, int], ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    block_ranks: dict[str, int] = field(default_factory=dict)
    block_alphas: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("variant", VARIANTS), ("init", INITS), ("bias", BIASES)):
            value = getattr(self, name)
            if name == "init" and value in FOREIGN_INITS:
                raise ConfigError(
                    f'init = "{value}" is one of PEFT\'s for language models, and is not offered here. Use "pissa", '
                    'which begins from the base\'s own weights, or "gaussian".'
                )
            if value not in known and not (name == "init" and is_from_base(value)):
                raise ConfigError(f'{name} = "{value}" is unknown.{did_you_mean(str(value), known)}')
        self._check_numbers()
        self._check_kind()
        self._check_layers()
        for name in ("targets", "exclude"):
            if isinstance(value := getattr(self, name), str):
                _check_expression(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            for expression in getattr(self, name):
                _check_expression(name, expression)
        check_named(self.block_ranks)
        check_named(self.block_alphas)

    def _check_numbers(self) -> None:
        ranks = (("rank", self.rank), *_entries("rank_pattern", self.rank_pattern))
        blocks = _entries("block_ranks", self.block_ranks)
        for where, rank, least in (*((*r, 1) for r in ranks), *((*r, 0) for r in blocks)):
            if not least <= rank <= 4096:
                raise ConfigError(
                    f"{where} = {rank} is out of range: use {least} to 4096 (4 to 64 are usual)."
                )
        alphas = (
            *_entries("alpha_pattern", self.alpha_pattern),
            *_entries("block_alphas", self.block_alphas),
        )
        for where, alpha in (("alpha", self.alpha), *alphas):
            if alpha is not None and not 0 < alpha < float("inf"):
                raise ConfigError(
                    f"{where} = {alpha} must be a positive number; leave it out for alpha = rank."
                )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dropout = {self.dropout} must be at least 0 and below 1: it is the share of the input to drop "
                "(0 to 0.1 are usual)."
            )

    def _check_kind(self) -> None:
        if self.loftq_iterations < 1:
            raise ConfigError(
                f"loftq_iterations = {self.loftq_iterations} must be at least 1; 1 to 5 are usual."
            )
        if self.loftq_iterations != 1 and self.init != "loftq":
            raise ConfigError(
                f'loftq_iterations = {self.loftq_iterations} is about init = "loftq": leave it out, or set that.'
            )
        if self.kind != "lokr" and (self.factor != -1 or self.decompose_both):
            name, value = ("factor", self.factor) if self.factor != -1 else ("decompose_both", "true")
            raise ConfigError(
                f'{name} = {value} is about LoKr, and kind = "{self.kind}": leave it out, or set kind = "lokr".'
            )
        if self.factor != -1 and self.factor < 1:
            raise ConfigError(f"factor = {self.factor} must be at least 1, or -1 for about the square root.")
        if self.kind != "lora" and self.init not in _OWN_INITS:
            raise ConfigError(
                f'init = "{self.init}" is a beginning of kind = "lora", and kind = "{self.kind}" has its own: leave '
                "init out."
            )

    def _check_layers(self) -> None:
        if self.layer_replication and (self.init.startswith("pissa") or self.init in FROM_BASE):
            raise ConfigError(
                f'init = "{self.init}" takes its beginning from the base\'s weight, which replicated layers share. '
                "Leave init or layer_replication out."
            )
        if self.layers_to_transform is None:
            if self.layers_pattern:
                raise ConfigError(
                    f"layers_pattern = {self.layers_pattern!r} says what layers_to_transform counts in: give that too, "
                    "or leave it out."
                )
            return
        for index in self.layer_indices:
            if index < 0:
                raise ConfigError(f"layers_to_transform = {index} must count from 0.")
        if not self.layer_indices:
            raise ConfigError("layers_to_transform is empty: give an index, or leave it out for all layers.")
        for expression in as_tuple(self.layers_pattern):
            _check_expression("layers_pattern", expression)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        indices = self.layers_to_transform
        return () if indices is None else (indices,) if isinstance(indices, int) else tuple(indices)

    def rank_at(self, path: str) -> int:
        """0: no LoRA there."""
        return int(_by_pattern(self.rank_pattern, path, _by_block(self.block_ranks, path, self.rank)))

    def alpha_at(self, path: str) -> float:
        default = self.rank_at(path) if self.alpha is None else self.alpha
        return float(_by_pattern(self.alpha_pattern, path, _by_block(self.block_alphas, path, default)))


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Of names; an empty string is none."""
    return tuple(filter(None, (value,))) if isinstance(value, str) else tuple(value)


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether it is the end of the path, from a dot on (PEFT's rule for rank_pattern and alpha_pattern)."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _by_pattern(patterns: dict[str, int] | dict[str, float], path: str, default: float) -> float:
    """The first pattern that matches decides."""
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, path)), default)


def _by_block(blocks: dict[str, int] | dict[str, float], path: str, default: float) -> float:
    key = deciding(blocks, path)
    return default if key is None else blocks[key]


def _entries(name: str, patterns: Mapping[str, _Value]) -> Iterable[tuple[str, _Value]]:
    return ((f"{name}.{pattern}", value) for pattern, value in patterns.items())


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as problem:
        raise ConfigError(
            f'{name}: "{expression}" is no regular expression: {problem}. Correct it, or put a backslash before the '
            "sign that is meant literally."
        ) from problem
