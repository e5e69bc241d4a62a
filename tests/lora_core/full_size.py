"""The real models at full size, as their configurations are published, on the meta device: names, kinds and shapes of
their layers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core.adapter import file_path

FAMILIES = ("sd1", "sd2", "sdxl")
UP_WITH_ATTENTION = {
    "sd1": frozenset({1, 2, 3}),
    "sd2": frozenset({1, 2, 3}),
    "sdxl": frozenset({0, 1}),
}


class Built(NamedTuple):
    kind: str  # "Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding"
    shape: tuple[int, ...]  # of the weight


@functools.cache
def models_of(family: str) -> dict[str, nn.Module]:
    """By component. Shared by the tests: none of them changes a module."""
    sd = {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    }
    unets: dict[str, dict[str, Any]] = {
        "sd1": {**sd, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "sd2": {
            **sd,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "sdxl": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }

    def text(width: int, layers: int, projection: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=projection,
            hidden_act="quick_gelu" if width == 768 else "gelu",  # OpenAI's CLIP, and OpenCLIP
        )

    with torch.device("meta"):
        models: dict[str, nn.Module] = {"unet": UNet2DConditionModel(**unets[family])}
        models["text_encoder"] = CLIPTextModel(text(1024, 23, 512) if family == "sd2" else text(768, 12, 768))
        if family == "sdxl":
            models["text_encoder_2"] = CLIPTextModelWithProjection(text(1280, 32, 1280))
    return models


def vae_of(family: str) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size={"sd1": 512, "sd2": 768, "sdxl": 1024}[family],
            scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        )


@functools.cache
def everything(family: str) -> dict[str, Built]:
    """Adapter path -> every layer with a weight."""
    return {
        f"{component}.text_projection" if path == "text_projection" else file_path(component, path): Built(
            type(module).__name__, tuple(module.weight.shape)
        )
        for component, model in models_of(family).items()
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def full_size(family: str) -> dict[str, tuple[int, ...]]:
    """Adapter path -> the weight's shape, of every linear layer and convolution."""
    return {p: made.shape for p, made in everything(family).items() if made.kind in ("Linear", "Conv2d")}
