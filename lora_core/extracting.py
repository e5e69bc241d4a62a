"""A LoRA out of two checkpoints: what fine-tuning has changed, as factors of a low rank.

    lora = extract("sd15.safetensors", "my-dreambooth", rank=32)
    lora = extract("demo", tuned, energy=0.95, targets=("attention", "feed-forward"))

Per layer ΔW = W_tuned - W_base in fp32, and of it the best of that rank (lower_rank.best_factors). A fine-tuned model
differs by more than a low rank in every layer, so something is always lost; how much is in the metadata (`LOST`, and
per layer in `LOST_BY_LAYER`), measured on the factors themselves: |ΔW - B A| / |ΔW|.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.adapter import COMPONENTS, Adapter, file_path, is_finite
from lora_core.config import LoraConfig
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.errors import ConfigError, LoraError, NothingMatched, WrongFamily
from lora_core.families import by
from lora_core.lower_rank import LEFT_OUT, LOST, Lost, best_factors, check_rank, clamped, low_rank
from lora_core.model_weights import ModelWeights, weights_of
from lora_core.progress import steps
from lora_core.targets import find_targets

FROM = "lora_loom.extracted"  # metadata: from what, and how
LOST_BY_LAYER = "lora_loom.lost_by_layer"  # JSON: adapter path -> share

Targets = str | tuple[str, ...]


@torch.no_grad()
def extract(
    base: Any,
    tuned: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Targets = "all-linear+conv",
    exclude: Targets = (),
    clamp: float | None = None,
    others: Literal["name", "store"] = "name",
    name: str = "extracted",
) -> Adapter:
    """The LoRA that turns `base` into `tuned`, as nearly as its rank allows.

    base, tuned     what `open_base` takes, or opened models with the weights they have now. Files are read one
                    tensor at a time
    rank, energy    of each layer, or the smallest rank that holds this share (0..1) of |ΔW|²
    targets         which layers, as in LoraConfig, of UNet and text encoders; layers without a difference are left out
    clamp           entries of A and B are held within ± this quantile of them, as in `combine`
    others          norms, biases and embeddings that differ: "name" them in the metadata (`LEFT_OUT`), or "store" them
                    whole (not every program reads such keys). The VAE is not a LoRA's matter: named in either case

    Parameters are the same where the coarser of the two files' dtypes cannot tell them apart. Raises ConfigError for
    settings that make no sense, WrongFamily for models of different families or sizes, LoraError where nothing
    differs, FileRefused.
    """
    check_rank(rank, energy, clamp)
    if others not in ("name", "store"):
        raise ConfigError(f'others = "{others}" is unknown. Use "name" or "store".')
    before, after = weights_of(base), weights_of(tuned, settled=True)
    _check_alike(before, after)
    wanted = _wanted(before, targets, exclude)
    made = _Made()
    for component, path, module in steps(list(_modules(before)), "layers"):
        changed = dict(_differences(before, after, component, path, module))
        whole = _path(component, path)
        chosen, storing = (component, path) in wanted, others == "store" and component in COMPONENTS
        if chosen and "weight" in changed:
            change = changed.pop("weight")
            down, up = best_factors(algebra.flat(change), rank=rank, energy=energy)
            if clamp is not None:
                down, up = clamped(down, up, clamp)
            made.add(whole, change, down, up)
        # a linear layer or convolution beside the targets was not wanted, whole least of all
        if storing and "weight" in changed and not isinstance(module, nn.Linear | nn.Conv2d):
            made.deltas[whole] = Full(changed.pop("weight").cpu())
        if storing and "bias" in changed:
            made.deltas[whole] = WithBias(made.deltas.get(whole), changed.pop("bias").cpu())
        made.left_out += [f"{whole}.{kind}" for kind in changed]
    if not made.deltas:
        raise LoraError(_nothing(before, after, made.left_out))
    return Adapter(made.deltas, made.metadata(before, after, rank, energy), before.family.key, name)


@dataclass
class _Made:
    deltas: dict[str, Delta] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    lost: Lost = field(default_factory=Lost)
    by_layer: dict[str, float] = field(default_factory=dict)

    def add(self, path: str, change: Tensor, down: Tensor, up: Tensor) -> None:
        """change of the weight's shape, down (r, in*k*k), up (out, r)."""
        whole, gone = (t.square().sum() for t in (change, algebra.flat(change) - up @ down))
        self.lost.add(whole, gone)
        self.by_layer[path] = round(float((gone / whole).sqrt()), 6)
        self.deltas[path] = low_rank(down.cpu(), up.cpu(), change.shape, torch.float32)

    def metadata(
        self, before: ModelWeights, after: ModelWeights, rank: int | None, energy: float | None
    ) -> dict[str, str]:
        kept = f"rank {rank}" if energy is None else f"{energy:g} of the energy"
        return {
            FROM: f"{after.name} minus {before.name}; {kept}",
            LOST: f"{self.lost.share:.6f}",
            LOST_BY_LAYER: json.dumps(self.by_layer),
            **({LEFT_OUT: json.dumps(self.left_out)} if self.left_out else {}),
            **({"modelspec.prediction_type": "v"} if after.v_prediction else {}),
        }


def _wanted(weights: ModelWeights, targets: Targets, exclude: Targets) -> set[tuple[str, str]]:
    """(component, module path) of the layers chosen. A target may be of one component alone: text encoders have no
    convolutions."""
    found: set[tuple[str, str]] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        # a lone expression is matched against whole paths, a tuple's entries against their ends
        config = LoraConfig(targets=target if isinstance(targets, str) else (target,), exclude=exclude)
        nothing: list[NothingMatched] = []
        for component in COMPONENTS:
            if component in weights.models:
                try:
                    found |= {
                        (component, path) for path, _ in find_targets(weights.models[component], config)
                    }
                except NothingMatched as reason:
                    nothing.append(reason)
        if len(nothing) == sum(component in weights.models for component in COMPONENTS):
            raise nothing[0]
    return found


def _check_alike(before: ModelWeights, after: ModelWeights) -> None:
    if before.family != after.family:
        raise WrongFamily(
            f"{before.name} is {before.family.title} and {after.name} is {after.family.title}: there is no LoRA "
            "between them. Give the model that the tuned one was made from."
        )
    for component in dict.fromkeys((*before.models, *after.models)):
        shapes = [
            {n: tuple(p.shape) for n, p in w.models[component].named_parameters()}
            if component in w.models
            else {}
            for w in (before, after)
        ]
        for key in dict.fromkeys((*shapes[0], *shapes[1])):
            one, other = (f"is {by(s[key])}" if key in s else "does not exist" for s in shapes)
            if one != other:
                raise WrongFamily(
                    f"{component}.{key} {one} in {before.name} and {other} in {after.name}: they are of different "
                    "sizes. Give the model that the tuned one was made from."
                )


def _modules(weights: ModelWeights) -> Iterator[tuple[str, str, nn.Module]]:
    """(component, path, module) of every module that has parameters of its own."""
    for component, model in weights.models.items():
        for path, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                yield component, path, module


def _differences(
    before: ModelWeights, after: ModelWeights, component: str, path: str, module: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """(name in the module, fp32 difference) of the parameters that differ."""
    for kind, _ in module.named_parameters(recurse=False):
        key = f"{path}.{kind}" if path else kind
        old, new = before.read(component, key), after.read(component, key)
        old = old.to(new.device)
        coarser = max((old.dtype, new.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        if not torch.equal(old.to(coarser), new.to(coarser)):
            change = new.float() - old.float()
            if not is_finite(change):
                raise LoraError(
                    f"{component}.{key} holds values that are NaN or infinite in {before.name} or {after.name}. "
                    "Use an undamaged checkpoint."
                )
            yield kind, change


def _path(component: str, path: str) -> str:
    return f"{component}.{path}" if component == "vae" else file_path(component, path)


def _nothing(before: ModelWeights, after: ModelWeights, left_out: list[str]) -> str:
    if not left_out:
        return f"{before.name} and {after.name} have the same weights: there is nothing to extract. Give two models."
    return (
        f"{before.name} and {after.name} differ in none of the layers chosen, only in {len(left_out)} other parameters "
        f'({left_out[0]}, ...). Choose other targets, or others = "store".'
    )
