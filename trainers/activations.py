"""Gradient checkpointing: activations are not kept, and computed again in the backward pass."""

from __future__ import annotations

from typing import Any

from lora_core.pipeline import LivePipeline


def checkpoint_activations(live: LivePipeline) -> None:
    for component in live.models:
        model: Any = live.models[component]
        if component == "unet":
            model.enable_gradient_checkpointing()
        else:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; CLIP has no dropout that this would wake
