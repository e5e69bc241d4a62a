"""LoRA itself: its maths, its files, and a live diffusers pipeline that wears it.

Names are imported when first used, so that `from lora_core import LoraConfig` does not wait for diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_core.hushed import hush

hush()

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.baking import bake
    from lora_core.base_weights import BaseReport
    from lora_core.burn import overlap
    from lora_core.combining import combine
    from lora_core.config import LoraConfig
    from lora_core.errors import LoraError
    from lora_core.extracting import extract
    from lora_core.facts import Coverage, coverage_on
    from lora_core.formats import read_adapter, retell, write_adapter
    from lora_core.generation import GeneratedImage, GenerationRequest
    from lora_core.looking import look
    from lora_core.mix import Mix
    from lora_core.model_weights import layers_of, strength_of
    from lora_core.models import open_base
    from lora_core.pipeline import LivePipeline
    from lora_core.resizing import resize
    from lora_core.thumbnail import with_thumbnail
    from lora_core.train_form import attach, collect, detach

_HOMES = {
    "Adapter": "adapter",
    "BaseReport": "base_weights",
    "Coverage": "facts",
    "GeneratedImage": "generation",
    "GenerationRequest": "generation",
    "LivePipeline": "pipeline",
    "LoraConfig": "config",
    "LoraError": "errors",
    "Mix": "mix",
    "attach": "train_form",
    "bake": "baking",
    "collect": "train_form",
    "combine": "combining",
    "coverage_on": "facts",
    "detach": "train_form",
    "extract": "extracting",
    "layers_of": "model_weights",
    "loftq_in_place": "loftq",
    "look": "looking",
    "open_base": "models",
    "overlap": "burn",
    "quantise": "quantised",
    "read_adapter": "formats",
    "resize": "resizing",
    "retell": "formats",
    "strength_of": "model_weights",
    "with_thumbnail": "thumbnail",
    "write_adapter": "formats",
}

__all__ = [
    "Adapter",
    "BaseReport",
    "Coverage",
    "GeneratedImage",
    "GenerationRequest",
    "LivePipeline",
    "LoraConfig",
    "LoraError",
    "Mix",
    "attach",
    "bake",
    "collect",
    "combine",
    "coverage_on",
    "detach",
    "extract",
    "layers_of",
    "loftq_in_place",
    "look",
    "open_base",
    "overlap",
    "quantise",
    "read_adapter",
    "resize",
    "retell",
    "strength_of",
    "with_thumbnail",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_core.{_HOMES[name]}"), name)
