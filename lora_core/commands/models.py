"""The commands that read whole models: a LoRA out of two (extract), and a model with LoRAs in it (bake)."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_core.baking import bake
from lora_core.commands.out import (
    Out,
    check_free,
    described,
    error_of,
    not_carried,
    read_parent,
    size_of,
)
from lora_core.dtypes import DTYPES
from lora_core.errors import ConfigError
from lora_core.extracting import extract
from lora_core.lower_rank import LEFT_OUT, LOST, check_rank
from lora_core.mix import AdapterWeight, WeightValue, split_weight
from lora_core.models import find_base
from lora_core.named_mixes import read_mix
from lora_core.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Extract:
    """A LoRA out of two models."""

    models: tuple[str, str]  # the base, the tuned one
    out: Out
    prediction: str | None = None  # of the tuned one
    rank: int | None = None
    energy: float | None = None
    clamp: float | None = None
    targets: tuple[str, ...] = ("all-linear+conv",)
    exclude: tuple[str, ...] = ()
    others: Literal["name", "store"] = "name"

    def __post_init__(self) -> None:
        check_rank(self.rank, self.energy, self.clamp)

    def run(self) -> Iterator[str]:
        base, tuned = self.models
        made = extract(
            base,
            find_base(tuned, prediction=self.prediction),
            rank=self.rank,
            energy=self.energy,
            # a lone one may be an expression for whole paths
            targets=self.targets[0] if len(self.targets) == 1 else self.targets,
            exclude=self.exclude,
            clamp=self.clamp,
            others=self.others,
        )
        yield f"{tuned} minus {base}: {len(made.deltas)} layers differ"
        path, back = self.out.write(made)
        yield f"wrote {described(back, path)}"
        yield f"lost to the rank: |dW - BA| / |dW| = {float(made.metadata[LOST]):.4g} over all layers"
        yield f"rounding: {error_of([(made, 1.0)], back, None)}"
        left_out = json.loads(made.metadata.get(LEFT_OUT, "[]"))
        yield from not_carried(left_out, "parameters that differ and are in no LoRA's layers")


@dataclass(frozen=True, kw_only=True)
class Bake:
    """`loras`: FILE[:WEIGHT], or the TOML of a saved mix or a recipe, whose weights are then times WEIGHT."""

    loras: tuple[str, ...]
    base: str
    path: Path
    prediction: str | None = None
    dtype: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_free(self.path, self.overwrite, folder=self.path.suffix != ".safetensors")
        if self.path.exists() and Path(self.base).exists() and self.path.samefile(self.base):
            raise ConfigError(f"{self.path} is the base model itself. Choose another name for the new one.")

    def run(self) -> Iterator[str]:
        loras = []
        for file, weight in (found for word in self.loras for found in mix_of(word)):
            adapter = read_parent(file)
            loras.append((adapter, weight))
            yield f"{weight} x {described(adapter, file)}"
        dtype = DTYPES[self.dtype] if self.dtype else None
        base = find_base(self.base, prediction=self.prediction)
        done = bake(base, loras, self.path, dtype=dtype, overwrite=self.overwrite)
        yield (
            f"wrote {self.path}: {self.base} with {done.changed} layers changed, {size_of(self.path) / 1e6:.1f} MB, "
            "every tensor read back and compared"
        )
        yield f"error |dW - dW'| / |dW| = {done.rounded:.4g}, by rounding alone"
        yield from not_carried(done.unused, "parts of the LoRAs that the model has no place for")


def mix_of(word: str) -> Iterator[tuple[Path, WeightValue]]:
    """One word of the command line -> files and weights. Raises ConfigError."""
    file, factor = split_weight(word)
    path = Path(file)
    if path.suffix != ".toml":
        yield path, factor
        return
    for lora, weight in (_of_recipe(path) if _is_recipe(path) else _of_mix(path)).items():
        yield lora, AdapterWeight.parse(lora.stem, weight).scaled(factor).plain


def _is_recipe(path: Path) -> bool:
    try:
        return "loras" in tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False  # what is wrong with it, read_mix says


def _of_recipe(path: Path) -> dict[Path, WeightValue]:
    return {Path(file): weight for file, weight in Recipe.read(path).loras.items()}


def _of_mix(path: Path) -> dict[Path, WeightValue]:
    """The app keeps mixes in models/Mixes, with paths below models/Lora."""
    mix, files = read_mix(path)
    found: dict[Path, WeightValue] = {}
    for name, weight in mix.items():
        if name not in files:
            raise ConfigError(
                f'{path.name} has no file for "{name}". Add one below [files], or name the LoRAs themselves.'
            )
        places = [path.parent / files[name], path.parent.parent / "Lora" / files[name]]
        there = next((place for place in places if place.exists()), None)
        if there is None:
            raise ConfigError(
                f'{path.name} names {files[name]} for "{name}", which is neither in {places[0].parent} nor in '
                f"{places[1].parent}. Put it there."
            )
        found[there] = weight.plain
    return found
