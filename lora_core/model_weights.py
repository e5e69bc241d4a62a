"""A model's parameters by name, wherever the model is: in memory, or on disk without being opened.

One layer is in memory at a time, so that what needs two models of an SDXL's size runs on any machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import burn
from lora_core.adapter import COMPONENTS, Adapter, file_path
from lora_core.base_files import Stored
from lora_core.errors import LoraError, NotLoaded
from lora_core.families import Family, check_belongs, family_of_unet
from lora_core.models import FoundBase, OpenedBase, find_base
from lora_core.safe_files import Header

PARTS = (*COMPONENTS, "vae")


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """`models` by component are there for their structure, and may be on the meta device; `read` (component,
    parameter name) gives a tensor in the model's shape and in the dtype it is stored in.

    pipeline    a diffusers pipeline of these models, for its scheduler, tokenizers and configuration
    unplaced    tensors of its files that are no parameters of it: key -> file
    """

    name: str
    family: Family
    models: Mapping[str, nn.Module]
    read: Callable[[str, str], Tensor]
    dtype_of: Callable[[str, str], torch.dtype]  # without reading it
    pipeline: Any
    unplaced: Mapping[str, Header] = field(default_factory=dict)

    @property
    def v_prediction(self) -> bool:
        return bool(self.pipeline.scheduler.config.get("prediction_type") == "v_prediction")

    def layers(self) -> Mapping[str, nn.Module]:
        """Adapter path -> layer with its weights, each read when it is asked for."""
        return _Layers(self)


def weights_of(source: Any, *, pristine: bool = False, settled: bool = False) -> ModelWeights:
    """`source`: all that `open_base` takes, a FoundBase, or an opened model (OpenedBase, LivePipeline, a diffusers
    pipeline). With `settled`, what the UNet of a file predicts is measured where the file does not say it.

    An opened model gives the weights it has now: what LoRAs on the rack add is not in them, what is fused is. With
    `pristine` one that was opened from files gives what stands in these. Raises FileRefused, and LoraError for
    weights that are not there (offloaded, quantised).
    """
    if isinstance(source, str | Path):
        source = find_base(source)
    if isinstance(source, FoundBase):
        found = source.settled() if settled else source
        return _stored(found.name, found.family, found.stored, found.pipeline)
    pipeline = getattr(source, "pipeline", source)
    opened = source if isinstance(source, OpenedBase) else getattr(source, "opened", None)
    if pristine and opened is not None and opened.quantised:  # the live modules are packed
        found = find_base(opened.path, prediction=pipeline.scheduler.config.prediction_type)
        return _stored(opened.name, found.family, found.stored, found.pipeline)
    if pristine and opened is not None:
        return _stored(opened.name, opened.family, opened.stored, pipeline)
    models = _models(pipeline)
    if "unet" not in models:
        raise LoraError(
            f"{type(source).__name__} is no model with a UNet. Give a folder, a .safetensors file or an opened model."
        )
    live = {c: dict(model.named_parameters()) for c, model in models.items()}
    name = opened.name if opened else type(pipeline).__name__

    def read(component: str, key: str) -> Tensor:
        parameter = live[component][key]
        if parameter.is_meta or not parameter.is_floating_point() or parameter.element_size() < 2:
            raise LoraError(
                f"{component}.{key} of {name} is offloaded or quantised ({parameter.dtype}, {parameter.device}). "
                "Give the model's file or folder instead."
            )
        return parameter.detach()

    return ModelWeights(
        name,
        family_of_unet(models["unet"]),
        models,
        read,
        lambda component, key: live[component][key].dtype,
        pipeline,
    )


def layers_of(source: Any, *adapters: Adapter) -> Mapping[str, nn.Module]:
    """Adapter path -> layer that holds W0, read from `source` (as in `weights_of`) when it is asked for: what
    `combine`, `resize`, `overlap` and `strength_of` want for a DoRA, without opening the model.

    `adapters` must be made for it: WrongFamily, or NotLoaded where it has none of a LoRA's layers.
    """
    weights = weights_of(source, pristine=True)
    for adapter in adapters:
        _found(adapter, weights)
    return weights.layers()


def strength_of(adapter: Adapter, base: Any, weight: float = 1.0) -> dict[str, float]:
    """|w ΔW| / |W| per block (burn.strength) of a LoRA on a model, which need not be opened for it (`weights_of`).

    Raises WrongFamily, and NotLoaded where the model has none of the LoRA's layers.
    """
    weights = weights_of(base, pristine=True)
    found = _found(adapter, weights)
    return burn.strength(weights.layers(), {path: [(weight, adapter.deltas[path])] for path in found})


def _found(adapter: Adapter, weights: ModelWeights) -> dict[str, nn.Module]:
    found = check_belongs(adapter, weights.models, weights.family)
    if not found:
        raise NotLoaded(
            f'None of the {len(adapter.deltas)} layers of "{adapter.name}" exist in {weights.name}. Give the model it '
            "is for."
        )
    return found


def _models(pipeline: Any) -> dict[str, nn.Module]:
    return {c: getattr(pipeline, c) for c in PARTS if getattr(pipeline, c, None) is not None}


def _stored(name: str, family: Family, parts: tuple[Stored, ...], pipeline: Any) -> ModelWeights:
    stored = {part.component: part for part in parts}
    for part in parts:
        part.check_unchanged()
    return ModelWeights(
        name,
        family,
        _models(pipeline),
        lambda component, key: stored[component].tensor(key),
        lambda component, key: stored[component].dtype(key),
        pipeline,
        _unplaced(parts),
    )


def _unplaced(parts: tuple[Stored, ...]) -> dict[str, Header]:
    places = [place for part in parts for place in part.places.values()]
    used = {(header.path, key.name) for header, key in places}
    headers = {header.path: header for header, _ in places}
    return {key: h for path, h in headers.items() for key in h.tensors if (path, key) not in used}


class _Layers(Mapping[str, nn.Module]):
    def __init__(self, weights: ModelWeights) -> None:
        self._weights = weights
        self._at = {
            file_path(component, path): (component, path, module)
            for component, model in weights.models.items()
            if component in COMPONENTS
            for path, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter)
        }

    def __getitem__(self, adapter_path: str) -> nn.Module:
        component, path, module = self._at[adapter_path]
        layer: nn.Module = copy.copy(
            module
        )  # the module itself stays as it is; copies share what is not assigned anew
        layer._parameters = {
            name: None
            if parameter is None
            else nn.Parameter(self._weights.read(component, f"{path}.{name}"), requires_grad=False)
            for name, parameter in module._parameters.items()
        }
        return layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)
