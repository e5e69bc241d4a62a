"""Combination: how several LoRAs become one, checked at birth and told in what they become."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from lora_core.adapter import Adapter
from lora_core.errors import ConfigError, did_you_mean
from lora_core.formats.metadata import parent

FROM = (
    "lora_loom.combined"  # metadata: JSON, Combination's fields and "of": name, weight and hash of each LoRA
)

Method = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How LoRAs become one, checked at birth. Raises ConfigError naming the field.

    density           share of the entries that pruning keeps, above 0; from 1 on nothing is pruned
    rank              of the result, for svd methods; None is the largest rank among the LoRAs in that layer
    clamp             for svd methods: entries of A and B are held within ± this quantile of them, above 0 to 1
    majority          whose sign wins: "total" the larger sum, "frequency" the larger number
    signed_election   elect with the weights' signs; without it as PEFT does, on the unweighted entries
    """

    method: Method = "cat"
    density: float | None = None
    rank: int | None = None
    clamp: float | None = None
    majority: Literal["total", "frequency"] = "total"
    signed_election: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f'method = "{self.method}" is unknown.{did_you_mean(str(self.method), METHODS)}'
            )
        if self.prunes:
            if self.density is None or not (math.isfinite(self.density) and self.density > 0):
                raise ConfigError(
                    f"{self.method} needs density, the share of entries that stays, above 0; it is {self.density}. "
                    "Usual is 0.5."
                )
        elif self.density is not None:
            raise ConfigError(
                f"density has no effect with {self.method}. Leave it out, or prune: ties, dare_linear."
            )
        for name, value in (("rank", self.rank), ("clamp", self.clamp)):
            if value is not None and not self.by_svd:
                raise ConfigError(
                    f"{name} has no effect with {self.method}. Leave it out, or use {with_svd(self.method)}."
                )
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank = {self.rank} must be 1 or more.")
        if self.clamp is not None and not 0 < self.clamp <= 1:
            raise ConfigError(f"clamp = {self.clamp} is a quantile: above 0 to 1. Usual is 0.99.")
        if self.majority not in ("total", "frequency"):
            raise ConfigError(f'majority = "{self.majority}" is unknown. Use "total" or "frequency".')
        elects = self.method.removesuffix("_svd").endswith("ties")
        for name, given in (
            ("majority", self.majority != "total"),
            ("signed_election", self.signed_election),
        ):
            if given and not elects:
                raise ConfigError(
                    f"{name} has no effect with {self.method}, which holds no election. Leave it out."
                )

    def recipe(self, adapters: Sequence[tuple[Adapter, float]]) -> str:
        """JSON: what of these fields was given, and the LoRAs with weights and hashes."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        of = [parent(adapter, weight) for adapter, weight in adapters]
        return json.dumps({"method": self.method, **given, "of": of})

    @property
    def by_svd(self) -> bool:
        return self.method.endswith("svd")

    @property
    def prunes(self) -> bool:
        return self.method not in ("cat", "linear", "svd")


def with_svd(method: str) -> str:
    return "svd" if method in ("cat", "linear") else f"{method.removesuffix('_svd')}_svd"
