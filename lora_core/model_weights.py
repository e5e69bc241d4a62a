"""A model's parameters by name, wherever the model is: in memory, or on disk without being opened.

One parameter is in memory at a time, so that two models of an SDXL's size can be compared on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core.errors import LoraError
from lora_core.families import Family, family_of_unet
from lora_core.models import OpenedBase, find_base

PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """`models` by component are there for their structure, and may be on the meta device; `read` (component,
    parameter name) gives a tensor in the model's shape and in the dtype it is stored in."""

    name: str
    family: Family
    models: Mapping[str, nn.Module]
    read: Callable[[str, str], Tensor]
    v_prediction: bool


def weights_of(source: Any) -> ModelWeights:
    """`source`: all that `open_base` takes, or an opened model (OpenedBase, LivePipeline, a diffusers pipeline) with
    the weights it has now: what LoRAs on the rack add is not in them, what is fused is.

    Raises FileRefused, and LoraError for weights that are not there (offloaded, quantised).
    """
    if isinstance(source, str | Path):
        found = find_base(source)
        stored = {part.component: part for part in found.stored}
        for part in found.stored:
            part.check_unchanged()
        models = {c: found.parts[c] for c in PARTS if c in found.parts}
        return ModelWeights(
            found.name,
            found.family,
            models,
            lambda component, name: stored[component].tensor(name),
            _predicts_v(found.parts["scheduler"]),
        )
    pipeline = getattr(source, "pipeline", source)
    opened = source if isinstance(source, OpenedBase) else getattr(source, "opened", None)
    models = {c: getattr(pipeline, c) for c in PARTS if getattr(pipeline, c, None) is not None}
    if "unet" not in models:
        raise LoraError(
            f"{type(source).__name__} is no model with a UNet. Give a folder, a .safetensors file or an opened model."
        )
    live = {c: dict(model.named_parameters()) for c, model in models.items()}
    name = opened.name if opened else type(pipeline).__name__
    return ModelWeights(
        name,
        family_of_unet(models["unet"]),
        models,
        lambda component, key: _there(live[component][key], f"{component}.{key}", name),
        _predicts_v(pipeline.scheduler),
    )


def _there(parameter: Tensor, path: str, name: str) -> Tensor:
    if parameter.is_meta or not parameter.is_floating_point():
        raise LoraError(
            f"{path} of {name} is offloaded or quantised ({parameter.dtype}, {parameter.device}). Give the model's "
            "file or folder instead."
        )
    return parameter.detach()


def _predicts_v(scheduler: Any) -> bool:
    return bool(scheduler.config.get("prediction_type") == "v_prediction")
