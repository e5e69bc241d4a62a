"""The models and files that are measured: full topology, random weights, no download.

How long a LoRA takes to load, fuse or undo depends on shapes and counts alone, so random weights measure the
same as trained ones. Both sides work on one base in memory: `twin` gives a second tree of modules over the same
tensors, so that SDXL (7 GB with its text encoders) is there once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core.base_parts import clip_tokenizer
from tests.small_models import small_pipeline

SIZES = ("tiny", "sd15", "sdxl")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}  # without AMX or AVX512, the latter is the faster
RANK = {"tiny": 4, "sd15": 16, "sdxl": 16}
COMPONENTS = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
NOISE = 1_000_003  # a prime, so that filling a matrix over and over with this noise repeats no row


def base(size: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """-> a diffusers pipeline. Everything but the VAE has the real size; no row depends on the decoder."""
    pipe = small_pipeline("sdxl" if size == "sdxl" else "sd1", dtype=dtype)
    if size == "tiny":
        return pipe
    tokenizer = clip_tokenizer()
    with torch.device("meta"):
        if size == "sdxl":
            parts = {
                "unet": sdxl_unet(),
                "text_encoder": CLIPTextModel(_text(768, 12, "quick_gelu")),
                "text_encoder_2": CLIPTextModelWithProjection(_text(1280, 32, "gelu")),
            }
        else:
            parts = {"unet": _sd15_unet(), "text_encoder": CLIPTextModel(_text(768, 12, "quick_gelu"))}
    for model in parts.values():
        _fill(model, dtype)
    tokenizers = dict.fromkeys((n for n in ("tokenizer", "tokenizer_2") if hasattr(pipe, n)), tokenizer)
    pipe.register_modules(**parts, **tokenizers)
    return pipe


def sd15_vae(dtype: torch.dtype) -> AutoencoderKL:
    """Of the real size; `base` has a small one, since no row about LoRAs depends on it."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        )
    _fill(vae, dtype)
    return vae


def twin(pipe: Any) -> Any:
    """A pipeline of its own modules over the very same parameters and buffers."""
    parts = dict(pipe.components)
    for name in COMPONENTS:
        if parts.get(name) is not None:
            shared = (*parts[name].parameters(), *parts[name].buffers())
            parts[name] = copy.deepcopy(parts[name], {id(tensor): tensor for tensor in shared})
    if isinstance(pipe, StableDiffusionPipeline):
        parts["requires_safety_checker"] = False
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    return other


def components(pipe: Any) -> dict[str, nn.Module]:
    return {c: getattr(pipe, c) for c in COMPONENTS if getattr(pipe, c, None) is not None}


def targets(pipe: Any) -> Iterator[tuple[str, str, nn.Linear]]:
    """(component, path, layer): attention and feed-forward of UNet and text encoders, as kohya trains them by
    default except for the blocks' entry and exit, which SD 1 has as convolutions."""
    for component, model in components(pipe).items():
        inside = ".transformer_blocks." if component == "unet" else ".layers."
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and inside in path:
                yield component, path, layer


def write_lora(pipe: Any, path: Path, *, rank: int, seed: int) -> Path:
    """A random LoRA in kohya's spelling, in the base's dtype, so that neither side has anything to convert.

    Factors such that ΔW is about a third of W: well above what bf16 rounds away. alpha is not rank."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = dict(COMPONENTS)
    if "text_encoder_2" in components(pipe):
        prefixes["text_encoder"] = "lora_te1_"
    tensors: dict[str, Tensor] = {}
    for component, inside, layer in targets(pipe):
        if component != "unet" and not inside.startswith("text_model."):
            inside = (
                f"text_model.{inside}"  # transformers 5 dropped it from one of its classes; files keep it
            )
        key = prefixes[component] + inside.replace(".", "_")
        down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
        up = torch.randn(layer.out_features, rank, generator=generator) * 0.6 / rank**0.5
        tensors[f"{key}.lora_down.weight"] = down.half()
        tensors[f"{key}.lora_up.weight"] = up.half()
        tensors[f"{key}.alpha"] = torch.tensor(rank / 2, dtype=torch.float16)
    save_file(tensors, path)
    return path


def unet_inputs(pipe: Any, batch: int = 2, *, side: int = 32) -> dict[str, Any]:
    """Latents of side x side, or smaller where the model is made for less."""
    generator = torch.Generator().manual_seed(9)
    config, dtype = pipe.unet.config, pipe.unet.dtype
    side = min(side, config.sample_size)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    given: dict[str, Any] = {
        "sample": noise(4, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(77, config.cross_attention_dim),
    }
    if getattr(pipe, "text_encoder_2", None) is not None:
        sizes = torch.tensor([[side * 8.0, side * 8, 0, 0, side * 8, side * 8]] * batch)
        pooled = noise(pipe.text_encoder_2.config.projection_dim)
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.to(dtype)}
    return given


@torch.no_grad()
def answers(pipe: Any) -> dict[str, Tensor]:
    """What each model says to fixed inputs, in fp32. Small ones: without fast bf16 an SDXL takes minutes for more."""
    ids = torch.arange(77)[None] + 3
    found = {"unet": pipe.unet(**unet_inputs(pipe, side=8)).sample.float()}
    for component, model in components(pipe).items():
        if component != "unet":
            found[component] = model(ids).last_hidden_state.float()
    return found


@torch.no_grad()
def _fill(model: nn.Module, dtype: torch.dtype) -> None:
    """From meta to memory: weights N(0, 1/fan in), norms near one. Initialising as the libraries do, in fp32
    and one layer after the other, takes a minute for SDXL."""
    nn.Module.to(model, dtype=dtype)  # diffusers' own `to` logs a line per model
    model.to_empty(device="cpu").eval().requires_grad_(False)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(dtype)
    at = 0
    for name, p in model.named_parameters():
        flat, done = p.view(-1), 0
        while done < len(flat):
            part = noise[at : at + len(flat) - done]
            flat[done : done + len(part)] = part
            done, at = done + len(part), (at + len(part)) % NOISE
        p.mul_(0.1 if p.dim() < 2 else p[0].numel() ** -0.5)
        if p.dim() < 2 and name.endswith("weight"):
            p.add_(1.0)
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise RuntimeError(f"{name}: a buffer of unknown content, which memory fresh from meta lacks")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def _text(width: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=49_406,
        eos_token_id=49_407,
    )


def _sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
