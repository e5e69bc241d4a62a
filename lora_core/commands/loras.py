"""The commands that make a LoRA file out of LoRA files: convert, combine, resize."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lora_core.adapter import Adapter
from lora_core.changes import is_of_norm, of_weight
from lora_core.combination import Combination
from lora_core.combining import combine
from lora_core.commands.out import (
    Out,
    described,
    layers_for,
    not_carried,
    read_parent,
    written,
)
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.errors import ConfigError
from lora_core.formats import read_adapter
from lora_core.formats.keys import is_embedding
from lora_core.lower_rank import LEFT_OUT, LOST, check_rank
from lora_core.mix import split_weight
from lora_core.resizing import resize, to_plain

RANK = 64  # of what had no factors and is baked: holds a LoHa of rank 8 and the usual LoKr whole


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Another spelling, another dtype; with `bake` every kind as a plain LoRA, and what the spelling has no words for
    left out and named."""

    source: Path
    out: Out
    bake: bool = False
    base: str | None = None
    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("energy", self.energy)):
            if value is not None and not self.bake:
                raise ConfigError(f"{name} has no effect without bake. Add it, or leave {name} out.")
        if self.rank is not None or self.energy is not None:
            check_rank(self.rank, self.energy)

    def run(self) -> Iterator[str]:
        before = read_adapter(self.source)
        yield described(before, self.source)
        layers = layers_for(self.base, before) if self.bake or self.base else None
        after: Adapter = before
        left_out: list[str] = []
        if self.bake:
            rank = RANK if self.rank is None and self.energy is None else self.rank
            after, left_out = _fitted(
                to_plain(before, rank=rank, energy=self.energy, layers=layers), self.out.spelling
            )
        try:
            yield from written(self.out, after, [(before, 1.0)], layers)
        except ConfigError as problem:
            if self.bake:
                raise
            raise ConfigError(
                f"{problem} --bake --base MODEL makes a plain LoRA of it here, and says what that loses."
            ) from problem
        yield from not_carried(left_out, f"changes that {self.out.spelling} has no words for")
        yield from not_carried(before.unused, "keys that are no part of a LoRA")


def _fitted(adapter: Adapter, spelling: str) -> tuple[Adapter, list[str]]:
    """Plain LoRAs as far as diffusers' and PEFT's spelling can say them, and the names of what is left out."""
    if spelling == "kohya":
        return adapter, []
    deltas: dict[str, Delta] = {}
    left_out = [f'the word "{word}"' for word in adapter.embeddings]
    for path, delta in adapter.deltas.items():
        change = of_weight(delta)
        if isinstance(delta, WithBias):
            left_out.append(f"{path}.bias")
        if change is None:
            continue
        if is_of_norm(change) or (spelling == "diffusers" and is_embedding(path)):
            left_out.append(f"{path}.weight")
        else:
            deltas[path] = change
    facts = {**adapter.metadata, LEFT_OUT: json.dumps(left_out)} if left_out else adapter.metadata
    return replace(adapter, deltas=deltas, metadata=facts, embeddings={}), left_out


@dataclass(frozen=True, kw_only=True)
class Combine:
    """Several LoRAs into one. Random methods draw the same numbers every time: the same words give the same file."""

    loras: tuple[str, ...]  # FILE[:WEIGHT]
    out: Out
    how: Combination
    base: str | None = None

    def run(self) -> Iterator[str]:
        before = []
        for file, weight in map(split_weight, self.loras):
            adapter = read_parent(file)
            before.append((adapter, weight))
            yield f"{weight:g} x {described(adapter, Path(file))}"
        layers = layers_for(self.base, *(adapter for adapter, _ in before))
        torch.manual_seed(0)
        made = combine(before, **asdict(self.how), layers=layers)
        yield from written(self.out, made, before, layers)
        if LOST in made.metadata and self.how.prunes:
            yield f"of the pruned sum, {float(made.metadata[LOST]):.4g} is lost to the rank"
        yield from not_carried(
            [key for adapter, _ in before for key in adapter.unused], "keys that are no part of a LoRA"
        )


@dataclass(frozen=True, kw_only=True)
class Resize:
    """One LoRA to another rank."""

    source: Path
    out: Out
    rank: int | None = None
    energy: float | None = None
    clamp: float | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank, self.energy, self.clamp)

    def run(self) -> Iterator[str]:
        before = read_parent(self.source)
        yield described(before, self.source)
        layers = layers_for(self.base, before)
        made = resize(before, rank=self.rank, energy=self.energy, clamp=self.clamp, layers=layers)
        yield from written(self.out, made, [(before, 1.0)], layers)
        yield from not_carried(before.unused, "keys that are no part of a LoRA")
